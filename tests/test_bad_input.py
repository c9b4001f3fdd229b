"""Every subcommand answers wrong input with a message that says what is wrong and what to type, and writes nothing."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]

# The words after `vae`, and a pattern of the message. The exit code is 2 unless a 1 comes before the pattern.
ROWS = r"""
trian | no subcommand 'trian'\. Did you mean 'train'\?
sigma=fixed | Did you mean 'vae train sigma=fixed'\?
'' | There is no subcommand ''\. .*Subcommands: train
--versoin | Did you mean '--version'\?
-x | There is no flag -x
train latent=0 | latent=0 is not allowed: it must be a whole number between 1 and 100000
train latent=-1 | latent=-1 is not allowed
train latent=nan | latent=nan is not allowed
train latent=1e400 | latent=inf is not allowed
train latent=true | latent=true is not allowed
train latent=null | latent=null is not allowed
train latent={a:1} | latent=\(several settings\) is not allowed
train latent=[] | latent=\[\] is not allowed
train 'latent=3 4' | latent=3 4 is not allowed
train 'latent=a b c' | latent=a b c is not allowed
train latent=[2,4] | latent=\[2, 4\] is not allowed: it must be a whole number .*, or a list \[C,h,w\]
train latent=[2,4,4,4] | latent=\[2, 4, 4, 4\] is not allowed
train latent=[2,4,0] | latent=\[2, 4, 0\] is not allowed
train latent=[2,4,4.0] | latent=\[2, 4, 4\.0\] is not allowed
train latent=[2,4,true] | is not allowed
train latent=[2,[4],4] | is not allowed
train latent=[a,b,c] | latent=\['a', 'b', 'c'\] is not allowed
train latent=[1000,100,100] | a product of at most 100000
train latent=4x7x7 | latent=4x7x7 is not allowed: .*with network=conv, 'latent=\[4,7,7\]'
train latent=[[2,4,4],[4,4,4]] | Type -m 'latent=\[2,4,4\],\[4,4,4\]' to sweep
train latent=[2,4,4] | network=mlp cannot be combined with latent=\[2, 4, 4\]: .*Type latent=32, or network=conv
train network=linear latent=[2,4,4] | Type latent=32, or network=conv
train network=conv latent=[4,8,8] | halves images of 8x8 pixels to 4x4\. Type 'latent=\[4,4,4\]', or latent=256
train network=resnet latent=[4,1,4] | network=resnet halves images of 8x8 pixels to 4x4
train network=conv dataset=shapes dataset.side=32 latent=[4,7,7] | to 16x16, 8x8 and 4x4\. Type 'latent=\[4,16,16\]',
train network=conv latent=[2,4,4] prior.latent=32 | prior\.latent=32 is not allowed: it differs from latent=\[2, 4, 4\]
train prior=flow latent=[1,1,1] | needs latent=2 or more
train epochs=0 | epochs=0 is not allowed
train epochs=1.5 | epochs=1.5 is not allowed
train epochs=99999999999999999999999 | epochs=9+ is not allowed
train batch_size=-5 | batch_size=-5 is not allowed
train batch_size=99999999999999999999 | batch_size=9+ is not allowed
train seed=-1 | seed=-1 is not allowed
train seed=1.5 | seed=1.5 is not allowed
train max_grad_norm=0 | max_grad_norm=0 is not allowed: it must be a number above 0 or null
train max_grad_norm=inf | max_grad_norm=inf is not allowed
train optimizer.lr=1e308 | its absolute value is above 3\.4e\+38, the largest number of float32
train regularizer.beta=1e308 | regularizer.beta=1e\+308 is not allowed: its absolute value is above
train optimizer.weight_decay=1e308 | its absolute value is above
train +schedule@regularizer.beta=linear regularizer.beta.stop=1e39 | regularizer.beta.stop=1e\+39
train optimizer.eps=nan | it is not a finite number|must be a number
train precision=half | it must be float32, tf32 or bfloat16
train precision=tf32 device=cpu | type precision=float32
train device=tpu | type device=auto, cpu
train device=cpu:7 | not available on this machine; type device=auto
train device=cuda:-1 | device=cuda:-1 is not
train device=meta | not available on this machine; type device=auto
train "device=''" | device= is not a device; type
train threads=-1 | threads=-1 is not allowed
train threads=1000000000 | between 1 and 1024 or auto
train compile=maybe | compile=maybe is not allowed: it must be true or false
train log_every=0 | log_every=0 is not allowed
train checkpoint_minutes=0 | checkpoint_minutes=0 is not allowed
train checkpoint_minutes=inf | checkpoint_minutes=inf is not allowed
train metrics=rate | metrics=rate is not allowed: it must be a list, each item a word or null
train objective=validation/elbow | Did you mean 'validation/elbo'\?
train overwrite=1 | overwrite=1 is not allowed: it must be true or false
train data_dir=3 | data_dir=3 is not allowed
train run_name=.. | exists, but is not a run .* choose a different run_name
train run_name=. | run_name='\.' is not a valid name
train "run_name=''" | run_name='' is not a valid name
train "runs_dir=''" | runs_dir='' is not a valid name
train run_name=/ | exists, but is not a run
train run_name=/etc/passwd | is a file, not a folder; choose a different run_name
train runs_dir=file.txt | file\.txt is a file, not a folder; choose a different
train runs_dir=file.txt/x | file\.txt is a file, not a folder
train run_name=digits | exists, but is not a run
train run_name=digits/a | holds a run with different settings: .*a different run_name=\.\.\., or type overwrite=true
train arms=3 | several runs: add -m
train -m arms=3 | arms must be a list of sweeps
train -m arms=[] | arms must be a list of sweeps
train -m arms=[3] | arms must be a list of sweeps
train -m "arms=['sigma=fixd']" | Did you mean 'fixed'\?
train choices.sigma=x | no group or setting 'choices'
train +choices.sigma=x | choices is not a setting
train sigma=Fixed | Did you mean 'fixed'\?
train sigma=fixed.yaml | accepts the name of a choice, not a file\. Did you mean 'fixed'\?
train sigma=../sigma/fixed | accepts the name of a choice, not a file
train sigma=/etc/passwd | accepts the name of a choice, not a file
train 'sigma=a b' | not a choice of sigma
train sigma=3 | '3' is not a choice of sigma
train sigma=null | leave sigma out, or choose one of
train sigma=[fixed] | type -m sigma=fixed
train sigma=fixed,shared | type -m to sweep
train sigma=fixed sigma.value=0 | type sigma=deterministic
train sigma=fixed sigma.value=nan | sigma\.value=nan is not allowed
train sigma=fixed sigma.value=1e-7 | between 1e-06 and 1e\+06
train sigma=fixed sigma.value=[1] | sigma\.value=\[1\] is not allowed
train sigma.value=1 | type sigma=fixed sigma\.value=1
train sigma=shared sigma.latent=3 | differs from latent=16\. Leave sigma\.latent out, or type latent=3
train prior.latent=3 | differs from latent=16\. Leave prior\.latent out, or type latent=3
train sigma._target_=os.system | add --trust os
train sigma._target_=vae_cli.axes.sigma.Sigma | is the base class of all choices of sigma
train sigma._target_=vae_cli.axes.sigma.Lerned | Did you mean 'Learned'\?
train sigma._target_=vae_cli.axes.prior.StandardNormal | it is not a Sigma
train sigma._target_=null | not the name of a class
train sigma._target_=. | --trust
train ~sigma._target_ | sigma=learned names no class: .*choose a different sigma=
train +sigma._args_=[1] | sigma\._args_ is not a setting
train +sigma._partial_=true | sigma\._partial_ is not a setting
train sigma=fixed sigma.value={_target_:os.system} | add --trust os
train prior=gaussian | not a choice of prior\. Choices: flow
train prior=flow latent=1 | needs latent=2 or more, .*type prior=mixture
train prior=flow prior.couplings=1 | prior\.couplings=1 is not allowed: it must be a whole number between 2 and 100
train prior=flow prior.hidden=0 | prior\.hidden=0 is not allowed
train prior=flow sigma=deterministic | prior=flow cannot be combined with sigma=deterministic: .*prior=standard_normal
train prior=flow regularizer=free_bits | regularizer=free_bits cannot be combined with prior=flow
train prior=flow regularizer=none | regularizer=none cannot be combined with prior=flow
train likelihood.scale=0 | likelihood\.scale=0 is not allowed
train likelihood.scale=1e300 | between 1e-06 and 1e\+06
train likelihood.scale=learnd | learned or optimal
train likelihood=bernoulli likelihood.scale=1 | type likelihood=gaussian likelihood\.scale=1
train likelihood=bernoulli likelihood.binarize=yes | none, dynamic or threshold
train regularizer.beta=-1 | regularizer\.beta=-1 is not allowed: it must be a number 0 or more
train regularizer.beta=1e400 | regularizer\.beta=inf is not allowed
train regularizer=capacity regularizer.gamma=-1 | regularizer\.gamma=-1 is not allowed
train regularizer=free_bits regularizer.floor=-1 | regularizer\.floor=-1 is not allowed
train regularizer.beta.epochs=3 | type \+schedule@regularizer\.beta=linear
train sigma=deterministic prior=scaled_normal | prior=scaled_normal cannot be combined with sigma=deterministic: .*type
train sigma=deterministic regularizer=free_bits | regularizer=free_bits cannot be combined with sigma=deterministic
train sigma=deterministic regularizer=capacity | regularizer=capacity cannot be combined with sigma=deterministic
train regularizer=energy prior=scaled_normal | regularizer=energy cannot be combined with prior=scaled_normal
train regularizer=none prior=scaled_normal | regularizer=none cannot be combined with prior=scaled_normal
train dataset=linear_gaussian likelihood=bernoulli | type likelihood=gaussian
train dataset=linear_gaussian likelihood=discretized_logistic | type likelihood=gaussian
train dataset=linear_gaussian network=conv | 8 to 128 pixels a side, not 4x4; type network=mlp
train optimizer=adm | Did you mean 'adam'\?
train optimizer.lr=-1 | optimizer\.lr=-1 is not allowed
train optimizer.betas=0.9 | optimizer\.betas=0\.9 is not allowed: it must be a list
train optimizer.betas=[0.9] | give two numbers, such as \[0\.9,0\.999\]
train optimizer.betas=[2,2] | Invalid beta
train optimizer.eps=abc | optimizer\.eps=abc is not allowed: it must be a number
train optimizer.fused=maybe | true or false or null
train +optimizer.momentm=1 | not an argument of Adam\..* Allowed arguments: lr
train optimizer._target_=torch.optim.LBFGS | not an argument of LBFGS
train optimizer._target_=torch.optim.Optimizer | is the base class of all choices of optimizer
train network.hidden=400 | network\.hidden=400 is not allowed: it must be a list
train network.hidden=[0] | each item a whole number
train network.hidden=[100000000] | would need .* of memory, .*give smaller numbers
train network.hidden=[999999999999999999999] | is not allowed
train network.activation=sigmoid | relu, tanh
train network=conv network.width=0 | network\.width=0 is not allowed
train network=conv network.normalization=layer | none, batch or group
train network=resnet network.blocks=100000000 | between 1 and 100
train dataset=nowhere | not a choice of dataset\. Choices: celeba
train dataset.validation=-1 | dataset\.validation=-1 is not allowed
train dataset.validation=1500 | a number between 0 and 1499
train dataset.split_seed=abc | dataset\.split_seed=abc is not allowed
train dataset=shapes dataset.side=7 | between 8 and 128
train dataset=shapes dataset.images=999999999 | would need .* of memory
train dataset=linear_gaussian dataset.eigenvalues=[] | give one positive number per pixel
train dataset=linear_gaussian dataset.eigenvalues=[nan] | each item a number above 0
train dataset=linear_gaussian dataset.test=5 | at least 17 images are needed
train dataset=image_folder | type dataset\.path=VALUE
train dataset=image_folder dataset.path=nowhere | does not exist\. Give the folder
train dataset=image_folder dataset.path=file.txt | is a file, not a folder
train dataset=image_folder dataset.path=empty | has no images: it is empty
train dataset=image_folder dataset.path=null | add dataset\.path=<folder>
train dataset=image_folder dataset.path=photos dataset.test=200 | too few .*dataset\.test=1 dataset\.validation=0
train dataset=image_folder dataset.path=photos dataset.side=0 | between 1 and 4096
train dataset=image_folder dataset.path=photos dataset.channels=2 | it must be 1 or 3
train dataset=image_folder dataset.path=photos dataset.background=pink | white or black
train dataset=image_folder dataset.path=photos dataset.test=1.5 | dataset\.test=1\.5 is not allowed
train dataset=image_folder dataset.path=photos data_dir=file.txt | is a file\. Give a folder
train dataset=mnist dataset.shape=[1,28] | channels \(1 or 3\), height and width
train dataset=mnist dataset.source=os | is not a class of torchvision\.datasets
train dataset=mnist dataset.train=3 | several settings, as \{train: true\}
train dataset=mnist dataset.crop=0 | dataset=mnist has no 'crop'; dataset=celeba has
train +schedule@regularizer.beta=linear regularizer.beta.epochs=0 | regularizer\.beta\.epochs=0 is not allowed
train +schedule@regularizer.beta=linear regularizer.beta.start=-1 | goes from -1 to 1
train +schedule@regularizer.beta=cosine | type regularizer\.beta\.start=VALUE
train +schedule@regularizer.beta=cyclic regularizer.beta.ramp=2 | between 0 and 1
train +schedule@optimizer.lr=steps optimizer.lr.values=[1,2] optimizer.lr.epochs=[1] | two lists of the same length
train +schedule@optimizer.lr=steps optimizer.lr.values=[-1] optimizer.lr.epochs=[1] | optimizer\.lr
train +schedule@regularizer.beta=linr | Did you mean 'linear'\?
train +schedule@sigma.value=linear sigma=fixed | set the schedule's start and stop
train +schedule@sigma.value=linear | sigma=fixed has it
train +schedule@latent=linear | latent=\(a schedule\) is not allowed
train +schedule@nowhere=linear | nowhere is not a setting
train +schedule@optimizer.lr=linear | set where it starts and stops
train +schedule@optimizer.betas=linear | no schedule can replace it
train schedule=linear | type \+schedule@regularizer\.beta=linear
train latent | 'latent' gives no value\. Type latent=16
train latent 8 | 'latent 8' needs an equals sign\. Type latent=8\.
train epochs=1 sigma fixed | 'sigma fixed' needs an equals sign\. Type sigma=fixed\.
train -m sigma learned,fixed | Type sigma=learned,fixed\.
train --sigma fixed | without dashes: sigma=fixed\.
train --latent --info | without dashes: latent=VALUE\.
help nowhere | There is no subcommand 'nowhere'
train fixed | type sigma=fixed
train '' | is not an override
train , | is not an override
train =3 | does not name a setting
train latent==3 | one '=' too many
train 'latent=[1' | a bracket is not closed
train 'latent=(1' | a bracket is not closed
train 'latent=`id`' | Quote it twice
train run_name=é | contains a letter that is not ASCII\. Quote it twice: 'run_name="é"'
train run_name={x} | For a text, quote it twice: 'run_name="{x}"'
train data_dir=~photos | means something different to Hydra\. Type the full path\.$
train 'latent=$(id)' | cannot be read as an override
train 'latent=${nowhere}' | the configuration has no 'nowhere'
train 'latent=${latent}' | Recursive interpolation
train 'latent=${oc.env:NO_SUCH_VARIABLE}' | Environment variable 'NO_SUCH_VARIABLE' not found
train 'latent=${foo:1}' | Unsupported interpolation type foo
train 'latent=???' | type latent=VALUE
train latent@x=3 | there is no group 'latent'
train ~latent | which every run needs
train ~nowhere | no 'nowhere' to remove
train +latent=3 | Type latent=3
train ++latent.x=3 | is not allowed
train +nothing=3 | nothing is not a setting
train sigma..value=3 | cannot be read
train sigma@prior=fixed | Type sigma=fixed
train 'latent=range(1,3)' | type -m to sweep
train 'latent=interval(1,3)' | hydra/sweeper=optuna
train hydra.run.dir=x latent=0 | Set run_name=
train hydra.nowhere=1 | Hydra's own configuration has no
train hydra/launcher=nowhere | not a choice of hydra/launcher\. Choices: basic
train hydra=nowhere | such as hydra/launcher=joblib
train experiment=nowhere | not a choice of experiment\. Choices
train -m latent=2,0 | The job latent=0 cannot run, so no job was started
train -m sigma=fixed,fixd | Did you mean 'fixed'
train -m latent=2,2 | two jobs of this sweep would train the same run
train -m epochs=1,2 | two jobs of this sweep would train the same run
train -m sigma=learned,deterministic prior=scaled_normal | no job was started: prior=scaled_normal cannot be combined
train -m 'latent=range(3,3)' | has no jobs: .*is empty
train --cfg jib | not one of 'job'
train --cfg job -p nowhere | has no such part
train --resolve | together with --cfg job
train --info nowhere | not one of 'all'
train --config-dir nowhere | there is no such folder
train --config-dir file.txt | there is no such folder
train --config-name nowhere | neither among the bundled
train --mltirun | Did you mean '--multirun'\?
train --epochs=3 | Settings are typed without dashes: epochs=VALUE
train --config-path x | with --config-dir
train -- --foo | flags go before any '--'
train --trust | requires an argument
sample | Missing argument
sample nowhere | There is no run 'nowhere' in runs.* Existing runs:
sample '' | contains 2 runs; choose one of them
sample digits | runs; choose one of them|matches 2 runs
sample runs | contains 2 runs; choose one of them
sample empty | empty is not a run: it has no config.yaml
sample file.txt | There is no run 'file.txt'
sample -- -a | There is no run '-a'
sample 'a b' | There is no run 'a b'
sample ünïcode | There is no run
sample a --count 0 | --count 0: must be greater than or equal to 1
sample a --count many | --count many: .*integer
sample a --count 999999999999 | would need .* of memory
sample a --from poserior | Did you mean 'posterior'\?
sample a --draws 3 | --draws has no effect
sample a --images 1 | --images has no effect
sample a --components 3 | --components has no effect
sample a --from mixture --components 0 | greater than or equal to 1
sample a --from mixture --components 99999 | too many for .* use a smaller number
sample a --from posterior --count 3 | --count has no effect
sample a --from posterior --images 297 | there are 297 test images, numbered 0 to 296
sample a --from posterior --images x | type numbers such as 0,5,9
sample a --from posterior --images -1 | type numbers such as 0,5,9
sample a --from posterior --draws 0 | --draws 0
sample a --temperature -1 | --temperature -1
sample a --temperature nan | --temperature nan
sample a --temperature inf | --temperature inf
sample a --seed x | --seed x
sample a --weights worst | not one of 'best', 'last'
sample a --device tpu | type device=auto
sample a --runs-dir nowhere | There are no runs in nowhere
sample a --runs-dir file.txt | There are no runs in file.txt
sample a --out file.txt/x | 1 | Choose a different folder with --out FOLDER
sample a b | unexpected extra argument
sample a --cout 3 | Did you mean '--count'\?
interpolate | Missing argument
interpolate nowhere | There is no run 'nowhere'
interpolate a --pair 0 | --pair 0: give exactly 2 test image numbers
interpolate a --pair 0,999 | there are 297 test images
interpolate a --pair a,b | type numbers such as 0,5,9
interpolate a --pair 0,1 --classes 3,8 | cannot be combined
interpolate a --pair 0,1 --count 3 | --count has no effect with --pair
interpolate a --classes 3 | --classes 3: give exactly two classes
interpolate a --classes 3,eleven | there is no class 'eleven'
interpolate a --file one.png | each pair needs two images, but the number given is odd \(1\)
interpolate a --file one.png --file nowhere.png | There is no file 'nowhere.png'
interpolate a --file one.png --file text.png | 'text.png' cannot be read as an image
interpolate a --file one.png --file empty | 'empty' cannot be read as an image: it is a folder, not a file\.$
interpolate a --grid 0,1 | --grid 0,1: give exactly 4 test image numbers
interpolate a --steps 1 | --steps 1
interpolate a --steps 100000 | --steps 100000
interpolate a --span 2 | --span has no effect without --traverse
interpolate a --traverse --span -1 | --span -1
interpolate a --traverse --span nan | --span nan
interpolate a --traverse --path slerp | --path has no effect
interpolate a --path geodesic --grid 0,1,2,3 | --grid cannot be combined with --path geodesic, .* choose --path linear
interpolate a --path geodesic --traverse | --path has no effect
interpolate a --path sideways | not one of 'linear'
interpolate a --seed 99999999999999999999999 | --seed 9+
interpolate a --pair 0,1 --device tpu | type device=auto
evaluate | There is nothing to evaluate\. Name a run
evaluate nowhere | There is no run 'nowhere'
evaluate a --quick --full | cannot be combined
evaluate a --metrics nowhere | there is no metric with this name\. .*Metrics: rate
evaluate a --metrics '' | there is no metric with this name
evaluate a --metrics os.system | add --trust os
evaluate a --samples 0 | --samples 0
evaluate a --samples 99999999 | --samples 99999999
evaluate a --seed x | --seed x
evaluate a --seed -1 | --seed -1
evaluate a --weights worst | not one of 'best', 'last'
evaluate a --device tpu | type device=auto
evaluate a --out file.txt/x | file\.txt is a file\. Write the evaluation elsewhere: vae evaluate .* --out FOLDER
export | Missing argument
export nowhere | There is no run 'nowhere'
export a b | unexpected extra argument
export a --format torchscript | not one of 'pt2', 'onnx'
export a --weights worst | not one of 'best', 'last'
export a --to file.txt | file\.txt is a file\. Write it elsewhere with --to FOLDER
export a --to file.txt/x | file\.txt is a file\. Write it elsewhere with --to FOLDER
export a --too x | Did you mean '--to'\?
runs nowhere | There is no folder nowhere
runs file.txt | There is no folder file.txt
runs empty | There are no runs in empty\. Train one first
runs a b | unexpected extra argument
runs --all | There is no flag --all
compare nowhere | There is no run 'nowhere'
compare empty | There are no runs in empty\. Train one first
compare a | Only .*a can be compared here, and a comparison needs at least two runs
compare a a | Only .*a can be compared here
compare file.txt a | There is no run 'file.txt'
compare --profile fast | not one of 'quick'
compare --metrics rat | --metrics rat: there is no metric with this name\. Did you mean 'rate'\?
compare --jobs 0 | --jobs 0
compare --jobs 1 --reference nowhere | nowhere
compare --jobs 1 --out file.txt | is a file\. Choose a different folder
compare --jobs 1 --out file.txt/x | is a file\. Choose a different folder
compare --runs-dir empty | There are no runs in empty
compare --jobs 1 --device tpu | type device=auto
"""  # fmt: skip


class Row:
    def __init__(self, line: str) -> None:
        words, *code, self.said = re.split(r" \| ", line)
        self.words = shlex.split(words)
        self.code = int(code[0]) if code else 2


TABLE = [Row(line) for line in ROWS.strip().splitlines()]


@pytest.mark.usefixtures("place")
def test_wrong_words(refused: Refused, is_long: bool, record_property: Callable[[str, object], None]) -> None:
    wrong = []
    rows = TABLE if is_long else random.Random(0).sample(TABLE, 160)
    for row in rows:
        try:
            said = refused(*row.words, code=row.code)
            assert re.search(row.said, said), said
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append(f"{shlex.join(row.words)}: {error}"[:1200])
    record_property("wrong inputs refused", f"{len(rows) - len(wrong)} of {len(rows)}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "sigma=fixd"], 2, "Did you mean 'fixed'?"),
        (["train", "threads=1000000000"], 2, "between 1 and 1024"),
        (["sample", "nowhere"], 2, "There is no run 'nowhere'"),
        (["compare", "a"], 2, "can be compared here"),
        (["sample", "a", "--out", "file.txt/x"], 1, "Choose a different folder with --out FOLDER"),
    ],
)
def test_the_program_itself_refuses_the_same(place: Path, words: list[str], code: int, said: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vae_cli", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("vae: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_names_with_invisible_or_too_many_characters(refused: Refused, place: Path) -> None:
    path = os.fsdecode(b"photos\xff")
    Path(path).mkdir()
    said = refused("train", "dataset=image_folder", f'dataset.path="{path}"')
    assert "is not allowed: it is not UTF-8 text" in said
    assert "invisible characters" in refused("train", "run_name='a\nb'")
    assert "invisible characters" in refused("train", "run_name='a\x1b[31mb'")
    assert "at most 255 bytes" in refused("train", f"run_name={'a' * 300}")
    assert "thousand digits" in refused("train", f"seed={'9' * 5000}")
    assert "is not allowed" in refused("train", f"regularizer.beta={'9' * 400}")
    assert "the name is too long" in refused("sample", "a" * 5000)
    assert r"\x1b[31m" in refused("sample", "\x1b[31mred")
    assert "There is no run" in refused("sample", "line\nbreak")


CHOICES = {
    "list.yaml": ("- a\n", "sigma=list names no class"),
    "word.yaml": ("hello\n", "sigma=word names no class"),
    "none.yaml": ("value: 3\n", "sigma=none names no class"),
    "evil.yaml": ("_target_: os.system\ncommand: touch pwned\n", "--trust os"),
    "tag.yaml": ("!!python/object/apply:os.system ['touch pwned']\n", "not valid YAML|tag"),
    "bad.yaml": ("a: [1\nb: {", "not valid YAML"),
    "latin.yaml": ("_target_: vae_cli.axes.sigma.Fixed\nvalue: \udcff\n", "cannot be read: it is not UTF-8"),
    "deep.yaml": ("a: " + "[" * 3000 + "]" * 3000, "cannot be read: it nests lists too deeply"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_wrong_choices_in_files_of_the_user(refused: Refused, place: Path, name: str) -> None:
    (place / "own/sigma/folder.yaml").mkdir(parents=True)
    text, said = CHOICES[name]
    (place / "own/sigma" / name).write_bytes(text.encode(errors="surrogateescape"))
    message = refused("train", "--config-dir", "own", f"sigma={name[:-5]}")
    assert re.search(said, message), message
    assert not (place / "pwned").exists()


EXPERIMENTS = {
    "choice": (
        "defaults:\n  - override /sigma: fixd\n",
        r"experiment=choice: 'fixd' is not a choice of sigma\. Did you mean",
    ),
    "key": ("latnt: 3\n", "latnt"),
    "value": ("latent: many\n", "latent=many is not allowed"),
    "group": ("defaults:\n  - override /sgma: fixed\n", "sgma"),
    "beta": ("regularizer:\n  beta: -3\n", r"regularizer\.beta=-3 is not allowed"),
    "reference": ("latent: ${nowhere}\n", "nowhere"),
    "sigma": ("sigma:\n  value: 3\n", "value"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_wrong_experiments_in_files_of_the_user(refused: Refused, place: Path, name: str) -> None:
    (place / "own/experiment").mkdir(parents=True)
    text, said = EXPERIMENTS[name]
    (place / f"own/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}")
    message = refused("train", "--config-dir", "own", f"experiment={name}")
    assert re.search(said, message), message


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(refused: Refused, place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("train", "runs_dir=locked", code=1)


def test_runs_dir_that_the_system_refuses(refused: Refused, place: Path) -> None:
    if Path("/proc").is_dir():
        assert "/proc/nowhere" in refused("train", "runs_dir=/proc/nowhere", code=1)


def test_a_failure_inside_this_package_is_not_a_mistake_of_the_user(
    place: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "digits.csv.gz")

    monkeypatch.setattr("vae_cli.axes.dataset.digits.read_digits", fail)
    assert "digits.csv.gz: Permission denied" in refused("train", code=1)
