"""The command `ich`: its help, its mistakes, and what it ends with."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from commands import run_module
from hydra import compose, initialize_config_dir

import ich
from ich.base.config import CONF_DIR, register_schemas
from ich.base.entry import Status
from ich.cli import COMMANDS, HYDRA, help_text, main
from ich.launch.command import CONFIGS
from ich.launch.composing import register_resolvers

Capture = pytest.CaptureFixture[str]


def in_process(argv: list[str]) -> int:
    """The exit status of a command, also of one that exits."""
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)


# Help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_ich_lists_its_commands(words: list[str], capsys: Capture) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.about)}$", out, re.M)
        assert f"ich {name} {command.example}" in out


def test_help_and_version_take_no_time_and_python_m_ich_is_ich() -> None:
    def seconds(*words: str) -> tuple[float, str]:
        before = os.times().children_user
        out = subprocess.check_output([sys.executable, "-m", "ich", *words], text=True)
        return os.times().children_user - before, out

    took, out = seconds("--help")
    assert out == help_text() + "\n"
    assert took < 0.5  # of a processor: other tests run beside this one
    assert seconds("--version")[1] == f"ich {ich.__version__}\n"


def examples(name: str) -> list[str]:
    """The commands that help shows for a command."""
    shown = [f"ich {name} {COMMANDS[name].example}"]
    if name in HYDRA:
        text = (CONF_DIR / "hydra" / "help" / f"{name}.yaml").read_text()
        shown += re.findall(rf"^ +(ich {name} .+)$", text, re.M)
        assert len(shown) == 6
    return shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_the_help_is_understood(name: str) -> None:
    register_schemas()
    register_resolvers()
    for text in examples(name):
        _, _, *words = shlex.split(text, comments=True)
        if name not in HYDRA:
            import_module(f"ich.{name}").parser().parse_args(words)
            continue
        words = [re.sub(r"=(?!\[)([^,]*),.*", r"=\1", w) for w in words if w != "-m"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            compose(CONFIGS[name][0], overrides=words)


@pytest.mark.parametrize("name", HYDRA)
def test_help_opens_with_what_a_command_does_and_names_the_groups(
    name: str, capsys: Capture
) -> None:
    assert in_process([name, "--help"]) == 0
    out = capsys.readouterr().out
    first, *_ = out.splitlines()
    assert first.endswith(".")
    assert "Hydra" not in out
    assert out.index("ich " + name) < out.index("\ndata: folder, phantom, rsna\n")
    # Every line of a group has all its options: some are written by hand.
    groups = re.findall(r"^((?:hydra/)?[a-z]+): (.+)$", out.partition("== Settings")[0], re.M)
    assert {"data", "protocol"} <= {group for group, _ in groups}
    assert name != "sweep" or {"model", "hydra/launcher", "hydra/sweeper"} <= dict(groups).keys()
    for group, options in groups:
        for file in (CONF_DIR / group).glob("*.yaml"):
            assert re.search(rf"\b{file.stem}\b", options), group


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in HYDRA])
def test_every_other_command_has_help_too(name: str, capsys: Capture) -> None:
    assert in_process([name, "--help"]) == 0
    assert f"usage: ich {name}" in capsys.readouterr().out


# Mistakes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("swep", "there is no command 'swep'. Did you mean sweep?"),
        ("sweep modle=resnet50", "has no setting modle. Did you mean model?"),
        ("sweep model=resnet5", "there is no model=resnet5. Did you mean model=resnet50?"),
        ("sweep -m model=vgg16,resnet5", "Did you mean model=resnet50?"),
        ("sweep -m hydra/launcher=slurm", "Did you mean hydra/launcher=ich_slurm?"),
        ("sweep -m hydra.launcher=local", "chosen with a slash: hydra/launcher=local"),
        ("sweep -m hydra/launcher=ich_slurm hydra.launcher.partion=x", "hydra.launcher.partition?"),
        ("sweep optimizer.lrr=1", "has no setting optimizer.lrr. Did you mean optimizer.lr?"),
        ("sweep +optimizer.foo=1", "Key 'foo' not in 'OptimizerConfig'"),
        ("sweep -m +optimizer.foo=1 seed=0,1", "Key 'foo' not in 'OptimizerConfig'"),
        ("sweep lr=1", "Did you mean context.lr or optimizer.lr?"),
        ("sweep epohs=1", "Did you mean context.epochs or train.epochs?"),
        ("sweep ~modle", "has no setting modle. Did you mean model?"),
        ("sweep resnet50", "resnet50 is no key=value, .* Did you mean model=resnet50?"),
        ("sweep a=b,c=d", """a=b,c=d cannot be read as .* Hydra too: ich sweep 'a="b,c=d"'"""),
        ("sweep seed=0,1", "seed=0,1 gives several values.*takes -m"),
        ("sweep train.monitor=acc", r"expected one of \[accuracy, auc, log_loss\]"),
        ("sweep train.epochs=x", "train.epochs=x does not fit: Value 'x' .* to Integer"),
        ("sweep +colour=red", "settings cannot be used: Key 'colour' not in 'Config'"),
        ("sweep name=${nope}", "Interpolation key 'nope' not found"),
        ("sweep --multirn", "unrecognized arguments: --multirn. Did you mean --multirun?"),
        ("sweep -m --cfg job", "Only one of --run, --multirun, --cfg.* traceback is in"),
        ("sweep optimizer.lr=nan", "optimizer.lr is nan, but must be"),  # of a single training
        ("sweep data.root=nowhere", "data.root is 'nowhere', which does not exist"),
        ("prepare data.rot=x", "`ich prepare` has no setting data.rot. Did you mean data.root?"),
        ("prepare model=vgg16", "Its groups are .*data"),
        ("evaluate modles=x", "Did you mean models?"),
        ("evaluate", "models is missing"),
        ("predict scans --modle run -o out.csv", "--modle.*|required: --model"),
        ("predict scans --model nothing -o out.csv", "the input is 'scans'"),
        ("export --model nothing --format onnx", "the model is 'nothing'"),
        ("report nothing", "nothing holds no sweep"),
        ("report a b --promot", "--promote takes one sweep, and 2 are given"),
        ("rerun nothing", "nothing holds no run"),
        ("train nothing", "nothing holds no run"),
        ("phantom out --patients 0", "patients=0 must be"),
        ("bench --rounds x", "argument --rounds: invalid int value: 'x'"),
        ("completion tcsh", "invalid choice: 'tcsh'"),
    ],
)
def test_a_mistake_is_one_paragraph_and_status_2(
    command: str,
    message: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(shlex.split(command)) == Status.MISTAKE
    out, err = capsys.readouterr()
    assert re.search(message, err), err
    assert err.startswith("ich: ")
    assert err.count("\n") == 1
    assert "HYDRA_FULL_ERROR" not in out + err
    assert "Error executing job" not in out + err
    assert not (tmp_path / "multirun_reports").exists()


@pytest.mark.parametrize(
    ("group", "yaml", "message"),
    [
        ("model", "name: x\n  timm: [\n", "mapping values are not allowed here in .*own.yaml"),
        ("loss", "name: bce\ngama: 2\n", "'loss/own': .*'gama' not in .* Did you mean loss.gamma?"),
    ],
)
def test_a_mistake_in_a_yaml_file_of_the_users_is_one_too(
    group: str, yaml: str, message: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / group).mkdir()
    (tmp_path / group / "own.yaml").write_text(yaml)
    assert main(["sweep", "--config-dir", str(tmp_path), f"{group}=own"]) == Status.MISTAKE
    err = capsys.readouterr().err
    assert re.search(message, err), err
    assert err.count("\n") == 1


def test_a_mistake_in_a_single_training_is_what_its_process_ends_with(tmp_path: Path) -> None:
    done = run_module("sweep", "model.pretrained=false", "data.root=nowhere", cwd=tmp_path)
    assert done.returncode == Status.MISTAKE
    assert done.stderr.startswith("ich: data.root is 'nowhere', which does not exist.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
