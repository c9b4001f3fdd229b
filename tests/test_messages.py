"""Each row of the table of messages answers an error that the real Hydra or OmegaConf raises.

If an update of either library changes a class or a text, another row or none answers, and the failing test names the
row that the update has broken.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from vae_cli.config import messages
from vae_cli.config.messages import TABLE, Refusal, Row, translate

Refused = Callable[..., str]

OPTUNA = "train -m hydra/sweeper=optuna latent=2,4"
BASIC = "hydra._internal.core_plugins.basic_launcher"

# The row that answers | what is typed | the message. Some rows have several lines.
TYPED = rf"""
missing value | train dataset=image_folder | dataset\.path needs a value: type dataset\.path=VALUE\.
reference to a missing value | train 'latent=???' | latent needs a value: type latent=VALUE\.
reference to an unknown key | train 'latent=${{latnt}}' | 'latent=.*': the configuration has no 'latnt'\. Did you
unknown resolver | train 'latent=${{foo:1}}' | 'latent=.*': Unsupported interpolation type foo\. References look like
unknown key | train latnt=3 | There is no group or setting 'latnt'\. Did you mean 'latent'
unknown key | train sigma.value=1 | sigma=learned has no 'value'; sigma=fixed, .* have: type sigma=fixed sigma\.value=1
unknown key | train hydra.job.chdr=true | Hydra's own configuration has no 'hydra\.job\.chdr'\. Did you mean 'chdir'
unknown key | train regularizer.beta.epochs=3 | To make it a schedule, type \+schedule@regularizer\.beta=
schedule in a wrong place | train +schedule@optimizer.betas=linear | optimizer\.betas is not a single number
resolver failed | train 'latent=${{oc.env:NO_SUCH}}' | 'latent=.*': Environment variable 'NO_SUCH' not found$
resolver failed | train 'latent=${{latent}}' | 'latent=.*': Recursive interpolation detected$
anything else of OmegaConf's | train hydra.mode=FOO | 'hydra\.mode=FOO': Invalid value 'FOO', expected one of
unreadable override | train latent==3 | has one '=' too many\. Did you mean 'latent=3'
unknown --config-name | train --config-name foo | foo: foo\.yaml is neither among the bundled configurations nor in
unknown choice | train sigma=fixd | 'fixd' is not a choice of sigma\. Did you mean 'fixed'\? Choices: bounded,
plugin without its configuration | train hydra/sweeper=nevergrad | hydra/sweeper=nevergrad is not installed: type pip
object that cannot be built | train -m latent=1,2 +hydra.launcher.x=1 | Error in call to target '{BASIC}\.BasicLauncher'
choice that is not a word | train sigma=3 | 'sigma=3': '3' is not a choice of sigma\. Choices: bounded,
override that Hydra refused | train +latent=3 | 'latent' exists already, so it needs no \+\. Type latent=3
override that Hydra refused | train sigma=fixed,shared | gives several values: type -m to sweep over them, or give one
override that Hydra refused | train sigma@x=fixed | sigma has a fixed place, so it needs no @\. Type sigma=fixed\.
override that Hydra refused | train ~latnt | there is no 'latnt' to remove\. Did you mean 'latent'
override that Hydra refused | train hydra.searchpath=3 | hydra\.searchpath must be a list of strings\. Got: 3
unknown plugin class | train -m latent=1,2 hydra.launcher._target_={BASIC}.No | Hydra has no plugin '{BASIC}\.No'\.
"""
LINES = [line.split(" | ") for line in TYPED.strip().splitlines()]

# The row that answers | a file of the user's, sigma/own.yaml | the message.
FILES = {
    "invalid YAML": ("a: [1\nb: {", "A configuration file is not valid YAML: while parsing a flow sequence"),
    "file in another encoding": ("value: \udcff\n", "A file that was chosen from own cannot be read: it is not UTF-8"),
    "file nested too deeply": ("a: " + "[" * 3000 + "]" * 3000, "cannot be read: it nests lists too deeply"),
    "missing file": ("defaults:\n  - nowhere\n", "In 'sigma/own': Could not load 'sigma/nowhere'."),
}


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the rows that have answered."""
    names: list[str] = []

    def note(row: Row) -> Row:
        def message(refusal: Refusal) -> str | None:
            said = row.message(refusal)
            if said is not None:
                names.append(row.name)
            return said

        return row._replace(message=message)

    monkeypatch.setattr(messages, "TABLE", tuple(map(note, TABLE)))
    return names


def test_every_row_has_a_test() -> None:
    assert {row.name for row in TABLE} == {name for name, *_ in LINES} | set(FILES)
    assert len({row.name for row in TABLE}) == len(TABLE)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("row", "words", "said"), LINES, ids=[f"{name}: {words}" for name, words, _ in LINES])
def test_a_row_answers_what_is_typed(row: str, words: str, said: str, refused: Refused, answered: list[str]) -> None:
    message = refused(*shlex.split(words))
    assert answered == [row]
    assert re.search(said, message.splitlines()[0]), message


@pytest.mark.parametrize("row", FILES)
def test_a_row_answers_a_file_of_the_users(row: str, refused: Refused, place: Path, answered: list[str]) -> None:
    text, said = FILES[row]
    (place / "own/sigma").mkdir(parents=True)
    (place / "own/sigma/own.yaml").write_bytes(text.encode(errors="surrogateescape"))
    message = refused("train", "--config-dir", "own", "sigma=own")
    assert answered == [row]
    assert said in message


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins") is None
    or importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="hydra-optuna-sweeper is not installed",
)
@pytest.mark.usefixtures("place")
def test_an_object_of_a_sweeper_that_cannot_be_built(refused: Refused, answered: list[str]) -> None:
    message = refused(*OPTUNA.split(), "hydra.sweeper.sampler._target_=nowhere.X")
    assert message == "vae: Error locating target 'nowhere.X'\n"
    assert answered == ["object that cannot be built"]


def test_an_error_of_another_library_has_no_message(answered: list[str]) -> None:
    for error in (ValueError("no"), KeyError("a"), RuntimeError("no"), ImportError("no"), RecursionError()):
        assert translate(error) is None
    assert answered == []
