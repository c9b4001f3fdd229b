"""Data-parallel training: several processes train one run, with the same result as a single process.

Every process has the whole model and the same random state. `share` divides a batch over the processes; inside it,
`mean` averages over the whole batch, `collect` returns its rows, and random numbers are drawn for the whole batch. Only
the first process writes files. With one process, nothing is communicated.
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
BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
)
T = TypeVar("T")

TO_MEET = timedelta(minutes=15)  # for the processes to find each other
PATIENCE = timedelta(hours=24)  # the others wait while the first evaluates or writes
FAREWELL = timedelta(seconds=5)  # the others wait for the first to end: torchrun stops it if one of them fails

# Names of functions and of tensor methods that draw a random number for each element of a tensor or of a size.
_SIZES = frozenset({"rand", "randn"})  # these also accept their size as separate numbers
_DRAWN = _SIZES | frozenset(
    [
        *("normal", "bernoulli", "multinomial", "randint", "rand_like", "randn_like", "randint_like"),
        *("normal_", "uniform_", "exponential_", "bernoulli_", "cauchy_", "geometric_", "log_normal_", "random_"),
        *("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("rrelu", "gumbel_softmax"),
    ]
)
# These draw as many random numbers as the values require, and a process knows only the values of its own share.
_REJECTED = frozenset({"poisson", "binomial", "_standard_gamma", "_sample_dirichlet"})


class _Division(NamedTuple):
    """This process's rows [start, stop) of a batch of `size` images; `counts` is False for duplicates (see `share`)."""

    start: int
    stop: int
    size: int
    counts: bool


_division: _Division | None = None  # of the current batch
_draws_alike = False  # see `drawn_alike`


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun has started, until the end of the block.

    Raises UserError if the environment is incomplete, and Failure if the connection to another process is lost. If the
    processes do not find each other, rank 0 raises Failure and the other ranks raise ConnectionError.
    """
    launch = launched()
    if launch.count == 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    # CPU tensors and Python objects are sent by gloo, so that no GPU has to wait for them.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://", timeout=TO_MEET))
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        # Only rank 0 prints a Failure, and rank 0 may be the missing one, so the others raise an error they print.
        kind = Failure if launch.rank == 0 else ConnectionError
        raise kind(f"the {launch.count} processes did not find each other: {first_line(error)}") from error
    try:
        with connected():
            yield
    finally:
        # If one process ends with an error, torchrun stops the others, so the first process, which writes, ends first.
        with suppress(RuntimeError):
            if launch.rank == 0:
                store.set("vae has ended", "1")
            else:
                store.wait(["vae has ended"], FAREWELL)
        dist.destroy_process_group()


@contextmanager
def connected() -> Iterator[None]:
    """Raise Failure, with a message for the user, in place of torch's errors about a lost process."""
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise Failure(
                "The connection to another process was lost: it has failed, or was stopped or killed. "
                "Run the same command again to resume the run from its last checkpoint."
            ) from error
        raise


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if _is_joined() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Return whether this is rank 0, the process that writes files."""
    return rank() == 0


def first(do: Callable[[], T]) -> T:
    """Call a function in the first process only; return its result, or raise its exception, in all processes."""
    if count() == 1:
        return do()
    outcome: list[Any] = [None, None]  # the result, the exception
    if is_first():
        try:
            outcome[0] = do()
        except Exception as error:  # whatever it is, the other processes wait for it
            dist.broadcast_object_list([None, _portable(error)], 0, device=CPU)
            raise
    dist.broadcast_object_list(outcome, 0, device=CPU)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def together(do: Callable[[], T]) -> T:
    """Call a function in every process; if it fails in some, all raise, and the message names the first that failed."""
    if count() == 1:
        return do()
    mine: Exception | None = None
    try:
        result = do()
    except Exception as error:  # whatever it is, the other processes must know
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
    """Return the values of all processes, ordered by rank."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def same(value: object) -> bool:
    """Return whether the value is equal in all processes."""
    return all(other == value for other in gathered(value))


def greatest(number: int) -> int:
    """Return the maximum of a number over all processes."""
    if count() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def total(tensor: Tensor) -> Tensor:
    """Return the sum of the processes' tensors, without gradients."""
    if count() == 1:
        return tensor
    whole = tensor.detach().clone()
    dist.all_reduce(whole)
    return whole


@contextmanager
def share(positions: Tensor, draws: int = 1) -> Iterator[Tensor]:
    """Yield this process's share of a batch, which is given as the positions (B,) of its images in the dataset.

    draws is the number of codes that are drawn for each image.

    Inside the block, `mean`, `mean_loss`, `collect` and `size` refer to the whole batch, and each image gets the same
    random numbers as with a single process. The sizes of shares differ by at most one image. If there are fewer images
    than processes, each process without an image processes a duplicate of the last image, because many torch operations
    fail on an empty batch. Duplicates are excluded from sums, means and what is collected.
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
        with _DrawnTogether(_division, draws):
            yield positions[start:stop]
    finally:
        _division = None


def size(values: Tensor) -> int:
    """Return the number of images in the whole batch; `values` (B, ...) has one row per image of this share."""
    return len(values) if _division is None else _division.size


def counted(values: Tensor) -> Tensor:
    """Return the values (B, ...) of a share, or no rows if the share is a duplicate (see `share`)."""
    return values if _division is None or _division.counts else values[:0]


def whole(values: Tensor) -> Tensor:
    """Return the values of the whole batch, from the values (B, ...) of each process's share, without gradients."""
    if _division is None:
        return values.detach()
    every = values.new_zeros(_division.size, *values.shape[1:])
    if _division.counts:
        every[_division.start : _division.stop] = values.detach()
    return total(every)


def own(values: Tensor) -> Tensor:
    """Return this process's share of values that are given for the whole batch."""
    return values if _division is None else values[_division.start : _division.stop]


def mean(values: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of values (B, ...) over the whole batch (dim=0), or over all elements, with gradients."""
    if _division is None:
        return values.mean(dim)
    inner = values.shape[1:].numel() if dim is None else 1
    whole: Tensor = _Sum.apply(counted(values).sum(dim))
    return whole / (_division.size * inner)


def collect(values: Tensor) -> Tensor:
    """Return the values (B, ...) of the whole batch, in its order, with gradients.

    `values` has one row per image of this share. Each process sends its rows as a sum, with zeros in place of all other
    rows, because shares differ in size.
    """
    if _division is None:
        return values
    own = counted(values)
    before = own.new_zeros(_division.start, *own.shape[1:])
    after = own.new_zeros(_division.size - _division.start - len(own), *own.shape[1:])
    collected: Tensor = _Sum.apply(torch.cat([before, own, after]))
    return collected


def first_row() -> int:
    """Return the row of the whole batch that is the first row of this share."""
    return 0 if _division is None else _division.start


def drawn_alike(draw: Callable[[], Tensor]) -> Tensor:
    """Return the result of `draw`, whose random numbers are the same in all processes, such as draws of the prior.

    Inside `share`, a draw with as many rows as the share would otherwise be taken for one that belongs to its images.
    """
    global _draws_alike
    if _division is None:
        return draw()
    _draws_alike = True
    try:
        return draw()
    finally:
        _draws_alike = False


def mean_loss(values: Tensor) -> Tensor:
    """Return this process's loss, scaled so that its mean over processes is the whole batch's mean of values (B,)."""
    if _division is None:
        return values.mean()
    return counted(values).sum() * (count() / _division.size)


class _Sum(torch.autograd.Function):
    """The sum over processes. The losses of all processes depend on it, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0])


class _DrawnTogether(TorchFunctionMode):
    """A torch mode in which each random draw for a share is made for the whole batch, and returns the share's rows.

    Such a draw is recognized only by its shape, (B, ...) or, for several codes of each image, (draws, B, D). So any
    other draw with as many rows as the share is also made for the whole batch, except inside `drawn_alike`.
    """

    def __init__(self, division: _Division, draws: int) -> None:
        super().__init__()
        self.start, self.stop, self.size, _ = division
        self.draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if _draws_alike or name not in _DRAWN:
            if name in _REJECTED and not _draws_alike:
                raise UserError(f"torch's {name.strip('_')} does not work with several processes; use one process.")
            return func(*args, **kwargs)
        if name in _SIZES and args and isinstance(args[0], int):
            args = (torch.Size(args),)
        whole = [*map(self._whole, args)], {key: self._whole(value) for key, value in kwargs.items()}
        drawn = func(*whole[0], **whole[1])
        if all(new is old for new, old in zip([*whole[0], *whole[1].values()], [*args, *kwargs.values()], strict=True)):
            return drawn  # nothing in the arguments has the rows of the share
        axis = 1 if drawn.dim() == 3 and drawn.shape[:2] == (self.draws, self.size) else 0
        own = drawn.narrow(axis, self.start, self.stop - self.start)
        if name.endswith("_"):  # in place
            return args[0].copy_(own)
        return own

    def _whole(self, argument: Any) -> Any:
        """Extend a tensor or a size from the share's rows to the whole batch's; return other arguments unchanged."""
        if not isinstance(argument, Tensor | tuple | list):
            return argument
        shape = tuple(argument.shape if isinstance(argument, Tensor) else argument)
        rows = self.stop - self.start
        axis = 1 if len(shape) == 3 and shape[:2] == (self.draws, rows) else 0
        if shape[axis : axis + 1] != (rows,):
            return argument
        sizes = [(*shape[:axis], n, *shape[axis + 1 :]) for n in (self.start, self.size, self.size - self.stop)]
        if not isinstance(argument, Tensor):
            return torch.Size(sizes[1])
        return torch.cat([argument.new_ones(sizes[0]), argument, argument.new_ones(sizes[2])], axis)


def wrap(module: nn.Module) -> nn.Module:
    """Return the module or, with several processes, a wrapper that averages gradients and synchronizes batch norm."""
    if count() == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    # Buffers are equal in all processes, so they are not broadcast. The argument has another name in newer torch.
    names = inspect.signature(DistributedDataParallel).parameters
    unsent: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(module), **unsent)


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a module contains batch normalization."""
    return any(isinstance(part, BATCH_NORMS) for part in module.modules())


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _portable(error: Exception) -> Exception:
    """Return the error or, if other processes could not unpickle it, a Failure with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception that cannot be rebuilt from its arguments may raise anything here
        return Failure(explain(error)[0])
    return error
