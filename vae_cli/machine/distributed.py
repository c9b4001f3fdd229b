"""One run on several processes: what they share, so that it is the run that one process would have trained.

All processes hold the whole model and the same random state. A batch is divided over them by `share`; inside, means
are those of the whole batch, and what is drawn at random is drawn for the whole batch. The first process alone writes.
With one process every function here returns what it is given, or does it.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from vae_cli.core.errors import Failure, UserError, explain, first_line
from vae_cli.machine.launch import launched, this_process

CPU = torch.device("cpu")
T = TypeVar("T")

TO_MEET = timedelta(minutes=15)
PATIENCE = timedelta(hours=24)  # the others wait while the first evaluates or writes
FAREWELL = timedelta(seconds=5)  # the others wait for the first to end, whose end would be cut short by theirs

# Functions that draw a number for each element of a tensor or of a size, by name: torch's own and tensors' methods.
_SIZES = frozenset({"rand", "randn"})  # which may be given their size number by number
_DRAWN = _SIZES | frozenset(
    [
        *("normal", "bernoulli", "multinomial", "randint", "rand_like", "randn_like", "randint_like"),
        *("normal_", "uniform_", "exponential_", "bernoulli_", "cauchy_", "geometric_", "log_normal_", "random_"),
        *("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("rrelu", "gumbel_softmax"),
    ]
)
# How many random numbers these take depends on the values, and a process knows its own only.
_REJECTED = frozenset({"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"})


class _Division(NamedTuple):
    """The rows [start, stop) of a batch of `size` images that are this process's, and whether it counts them."""

    start: int
    stop: int
    size: int
    counts: bool


_division: _Division | None = None  # of the batch that is being trained on


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun has started, until the end. Raises UserError where the environment is
    not whole, Failure where another process is lost."""
    launch = launched()
    if launch.count == 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    # Tensors on the CPU, and whatever is not a tensor, go by gloo, which a GPU need not wait for.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://", timeout=TO_MEET))
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        # Each says so for itself: the one that is missing may be the first.
        kind = Failure if launch.rank == 0 else ConnectionError
        raise kind(f"the {launch.count} processes did not find each other: {first_line(error)}") from error
    try:
        with connected():
            yield
    finally:
        # Where one process ends with an error, torchrun stops the others: the first is let go first.
        with suppress(RuntimeError):
            if launch.rank == 0:
                store.set("vae has ended", "1")
            else:
                store.wait(["vae has ended"], FAREWELL)
        dist.destroy_process_group()


@contextmanager
def connected() -> Iterator[None]:
    """Say in words where another process is lost. Raises Failure."""
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise Failure(
                "The connection to another process was lost: it has failed, or was stopped or killed. "
                "Type the same command again, and the run goes on from its last checkpoint."
            ) from error
        raise


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if _is_joined() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def first(do: Callable[[], T]) -> T:
    """Have the first process do something, and return its result, or raise what it raised, in all of them."""
    if count() == 1:
        return do()
    outcome: list[Any] = [None, None]  # what is returned, what is raised
    if is_first():
        try:
            outcome[0] = do()
        except Exception as error:  # whatever it is, the others wait to hear of it
            dist.broadcast_object_list([None, _portable(error)], 0, device=CPU)
            raise
    dist.broadcast_object_list(outcome, 0, device=CPU)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def together(do: Callable[[], T]) -> T:
    """Do something in every process; where some cannot, all raise, and the message names the one that could not."""
    if count() == 1:
        return do()
    mine: Exception | None = None
    try:
        result = do()
    except Exception as error:  # whatever it is, the others have to hear of it
        mine = error
    everybody = gathered((this_process(), mine and _portable(mine)))
    failed = [(who, error) for who, error in everybody if error is not None]
    if not failed:
        return result
    if mine is not None and (is_first() or len(failed) == count()):
        raise mine
    who, theirs = failed[0]
    message, code = explain(theirs)
    raise (UserError if code == UserError.exit_code else Failure)(f"{who}: {message}") from theirs


def gathered(value: T) -> list[T]:
    """What each process gives, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def same(value: object) -> bool:
    """Whether all processes give an equal value."""
    return all(other == value for other in gathered(value))


def greatest(number: int) -> int:
    """The greatest of the processes' numbers."""
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, through which no gradient goes."""
    if count() == 1:
        return tensor
    whole = tensor.detach().clone()
    dist.all_reduce(whole)
    return whole


@contextmanager
def share(positions: Tensor) -> Iterator[Tensor]:
    """Give this process its share of a batch; inside, `mean`, `mean_loss` and `size` are those of the whole batch, and
    whatever is drawn at random for the images of the share is what one process would have drawn for them.

    Shares differ by one image at most. Where there are fewer images than processes, those that are left over take the
    last image too, which they do not count: much of torch does not work on no image at all.
    """
    global _division
    if count() == 1:
        yield positions
        return
    each, more = divmod(len(positions), count())
    start = min(rank() * each + min(rank(), more), len(positions) - 1)
    stop = start + max(1, each + (rank() < more))
    _division = _Division(start, stop, len(positions), counts=rank() < len(positions))
    try:
        with _DrawnTogether(_division):
            yield positions[start:stop]
    finally:
        _division = None


def size(values: Tensor) -> int:
    """How many images the whole batch has, of which values (B, ...) are this process's."""
    return len(values) if _division is None else _division.size


def counted(values: Tensor) -> Tensor:
    """Of values (B, ...) of a share those that count."""
    return values if _division is None or _division.counts else values[:0]


def mean(values: Tensor, dim: int | None = None) -> Tensor:
    """The mean of values (B, ...) over the whole batch, for dim=0, or over everything; gradients go through it."""
    if _division is None:
        return values.mean(dim)
    inner = values.shape[1:].numel() if dim is None else 1
    whole: Tensor = _Sum.apply(counted(values).sum(dim))
    return whole / (_division.size * inner)


def mean_loss(values: Tensor) -> Tensor:
    """What this process has to go down, of which the mean over processes is the mean of values (B,) over the batch."""
    if _division is None:
        return values.mean()
    return counted(values).sum() * (count() / _division.size)


class _Sum(torch.autograd.Function):
    """The sum over processes. All of their losses depend on it, so that gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0])


class _DrawnTogether(TorchFunctionMode):
    """Draws at random for a whole batch whatever is asked for the rows of a share, and gives the rows.

    It knows them by their number alone, and takes a draw for something else that happens to have as many for theirs.
    """

    def __init__(self, division: _Division) -> None:
        super().__init__()
        self.start, self.stop, self.size, _ = division
        self.rows = slice(self.start, self.stop)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _DRAWN:
            if name in _REJECTED:
                raise UserError(f"torch's {name.strip('_')} cannot be drawn by several processes together; use one.")
            return func(*args, **kwargs)
        if name in _SIZES and args and isinstance(args[0], int):
            args = (torch.Size(args),)
        whole = [*map(self._whole, args)], {key: self._whole(value) for key, value in kwargs.items()}
        drawn = func(*whole[0], **whole[1])
        if all(new is old for new, old in zip([*whole[0], *whole[1].values()], [*args, *kwargs.values()], strict=True)):
            return drawn  # not for the images of the share
        if name.endswith("_"):  # in place
            return args[0].copy_(drawn[self.rows])
        return drawn[self.rows]

    def _whole(self, argument: Any) -> Any:
        """A tensor or a size of the share's rows, as one of all rows."""
        rows = self.stop - self.start
        if isinstance(argument, Tensor) and argument.dim() > 0 and argument.shape[0] == rows:
            before, after = (argument.new_ones(n, *argument.shape[1:]) for n in (self.start, self.size - self.stop))
            return torch.cat([before, argument, after])
        if isinstance(argument, tuple | list) and argument and argument[0] == rows:
            return torch.Size((self.size, *argument[1:]))
        return argument


def wrap(module: nn.Module) -> nn.Module:
    """The module, or with several processes one that is called like it and averages gradients over them."""
    if count() == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    # Nobody need send buffers to the others: they are equal in all. Newer versions of torch have another name for it.
    names = inspect.signature(DistributedDataParallel).parameters
    unsent: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(module), **unsent)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalizes over the images of a batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _portable(error: Exception) -> Exception:
    """An error that another process can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # classes that cannot be rebuilt from their arguments raise whatever they like
        return Failure(explain(error)[0])
    return error
