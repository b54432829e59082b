"""A command that Hydra composes: run without Hydra's frame around a mistake, which is explained.

Hydra announces what a job raises by its overrides, turns what a callback raises into a warning, and
ends a mistake with advice on a variable, or a traceback. Here all of them reach the caller.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import EnumMeta
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import ich
from ich.base.config import (
    CONF_DIR,
    PATHS,
    Config,
    EvaluateConfig,
    PrepareConfig,
    Schema,
    UserError,
    register_schemas,
    to_dataclass,
)
from ich.base.entry import Parser, Status, keep_traceback, nearest, shell_command
from ich.launch.composing import register_resolvers

# The config in conf/ that each command composes, and its schema.
CONFIGS: dict[str, tuple[str, type]] = {
    "sweep": ("config", Config),
    "prepare": ("prepare", PrepareConfig),
    "evaluate": ("evaluate", EvaluateConfig),
}


# What is said of a command line or a YAML file; other errors of Hydra's own may be ours too.
_MEANT = 3  # settings that a misspelt one may stand for, at most
_TOLD = (HydraException, OmegaConfBaseException, YAMLError)


class Carried(BaseException):
    """An error on its way through Hydra, which sees to every Exception itself."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


Task = Callable[[DictConfig], Any]


def carrying(task: Task) -> Task:
    """A task function whose errors reach the caller of `run_hydra` as they are."""

    @functools.wraps(task)
    def carry(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except Exception as error:
            raise Carried(error) from None

    return carry


def run_hydra(task: Callable[[], Any], command: str, argv: Sequence[str] | None) -> int:
    """Runs what `hydra.main` made of a task function, as `ich COMMAND ARGV`; returns 0.

    Args:
        task: it.
        command: one of `CONFIGS`.
        argv: options and overrides; by default this process's.

    Raises:
        UserError: what Hydra does not understand, and what is nearest to it.
    """
    words = [_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    _require_utf8(words)
    register_schemas()
    options(command).parse_args(words)
    try:
        _require_whole_paths(command, words)
        with _process_as(f"ich {command}", words):
            task()
        return Status.DONE
    except Carried as carried:
        error = carried.error
    except Exception as raised:
        if not _is_hydras(raised):
            raise
        raise UserError(explain(raised, command, words)) from None
    raise error  # not while Carried is handled, so that its own causes stand alone


def options(command: str) -> Parser:
    """Hydra's options, as its own parser takes them: a mistake in one is a paragraph here."""
    parser = Parser(command, None, add_help=False)
    add = parser.add_argument
    for flag, short in (("help", "h"), ("resolve", ""), ("run", "r"), ("multirun", "m")):
        add(f"--{flag}", *([f"-{short}"] if short else []), action="store_true")
    add("--cfg", "-c", choices=("job", "hydra", "all"))
    add("--package", "-p")
    add("--config-path", "-cp")
    add("--config-name", "-cn")
    add("--config-dir", "-cd")
    kinds = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    add("--info", "-i", const="all", nargs="?", choices=kinds)
    add("--hydra-help", action="store_true")
    hydras = f"ich {ich.__version__}, composed by Hydra {hydra.__version__}"
    add("--version", action="version", version=hydras)
    add("--shell-completion", "-sc", action="store_true", help=SUPPRESS)  # `ich completion`
    add("--experimental-rerun", help=SUPPRESS)
    add("overrides", nargs="*")
    return parser


def typed(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """What a task function is given, as dataclasses.

    Raises:
        UserError: a key that the schema does not have, or a value that it does not take.
    """
    # As plain values: a composed config has the type of its schema, and takes what was added to it.
    plain: Any = OmegaConf.create(OmegaConf.to_container(cfg))
    try:
        return to_dataclass(plain, schema)
    except OmegaConfBaseException as error:
        raise UserError(f"the settings cannot be used: {_flat(error)}.") from None


def _home(word: str) -> str:
    """`~` as the home folder where a path begins: of a value, of several, or within quotes."""
    home, (key, equals, value) = str(Path.home()), word.partition("=")
    return key + equals + re.sub(r"(?:(?<=[\[,\"'])|\A)~(?=/|\Z)", lambda _: home, value)


def _require_utf8(words: Iterable[str]) -> None:
    """Refuses names whose bytes are no UTF-8: they can stand in no YAML, JSON or database.

    Raises:
        UserError: such a name, and how to rename it.
    """
    for what, name in (("the current folder", str(Path.cwd())), *(("this word", w) for w in words)):
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise UserError(
                f"{what} holds bytes that are no UTF-8: {shown}. It could stand in no record of a "
                f"run. Rename it; convmv -f latin1 -t utf8 -r --notest FOLDER does so below a "
                f"folder."
            ) from None


def mend_word(word: str) -> str:
    """`key=value` as an override whose value Hydra reads as one text, whatever is in it."""
    parser = OverridesParser.create()
    key, _, value = word.partition("=")
    # Within quotes only their own kind is escaped, and what would refer to another setting.
    escaped = value.replace("${", r"\${")
    for quote in ("", '"', "'"):
        end = re.sub(r"\\+\Z", lambda m: m[0] * 2, escaped) if quote else value
        text = f"{key}={quote}{end.replace(quote, chr(92) + quote) if quote else end}{quote}"
        with suppress(HydraException):
            parsed = parser.parse_override(text)
            if not parsed.is_sweep_override() and str(parsed.value()) == value:
                return text
    return word


def _mended_command(command: str, words: Sequence[str], bad: Iterable[str] = ()) -> str:
    """The command to be pasted into a shell, with these words quoted, and what cannot be read."""
    chosen = {*bad, *(word for word in words if "=" in word and not _is_read(word))}
    return shell_command("ich", command, *(mend_word(w) if w in chosen else w for w in words))


def _require_whole_paths(command: str, words: Sequence[str]) -> None:
    """Refuses a path that is there, and that Hydra would take apart or read as a number.

    Raises:
        UserError: with the command that means the path.
    """
    bad = []
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key in PATHS and value != "null" and os.path.lexists(value) and mend_word(word) != word:
            bad.append(word)
    if bad:
        raise UserError(
            f"{bad[0]} is a path with characters that Hydra reads in its own way, such as commas, "
            f"brackets, #, = and umlauts. Quote it for Hydra too: "
            f"{_mended_command(command, words, bad)}"
        )


@contextmanager
def _process_as(name: str, words: list[str]) -> Iterator[None]:
    """Lets Hydra find a command line, and raise what it would otherwise print."""
    before, variable = sys.argv, "HYDRA_FULL_ERROR"
    full = os.environ.get(variable)
    sys.argv, os.environ[variable] = [name, *words], "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ[variable]
        else:
            os.environ[variable] = full


def _is_hydras(error: Exception) -> bool:
    """Whether Hydra, OmegaConf or a sweeper raised it: over the command line, or a YAML file."""
    if isinstance(error, _TOLD):
        # A class of ours that cannot be imported is no mistake of the user's.
        return not isinstance(error.__cause__, ImportError)
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = str(trace.tb_frame.f_globals.get("__name__")) if trace else ""
    kinds = ValueError | RuntimeError | TypeError
    return isinstance(error, kinds) and where.startswith(("hydra.", "hydra_plugins.", "optuna."))


def complete_override(command: str, words: Sequence[str], word: str) -> list[str]:
    """What Hydra's shell completion knows of an override.

    Args:
        command: one of `CONFIGS`.
        words: the command line between the command and the word.
        word: the beginning of an override; of values after commas the last is completed.
    """
    config, schema = CONFIGS[command]
    key, equals, value = word.rpartition("=")
    *earlier, last = value.split(",")
    head = key + equals + "".join(f"{v}," for v in earlier)
    if allowed := _allowed_words(schema, key):
        return [head + name for name in allowed if name.startswith(last)]
    # Of what stands before, only choices such as data=rsna tell which keys there are; several
    # values, and what is half a quotation, would keep Hydra from composing anything.
    plain = [w for w in words if re.fullmatch(r"[\w/.@]+=[\w./-]+", w)]
    os.environ["COMP_LINE"] = " ".join([command, *plain, f"{key}{equals}{last}"])
    wrap = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config)
    register_resolvers()
    with redirect_stdout(StringIO()) as found:
        # Of its shells, the one with an answer to a line.
        run_hydra(wrap(lambda _: None), command, ["-sc", "query=fish"])
    return [head + line[len(key + equals) :] for line in found.getvalue().split()]


def _allowed_words(schema: Any, key: str) -> list[str]:
    """The values of a setting that has a few by its type; Hydra knows only the one it has."""
    for part in key.split("."):
        schema = get_type_hints(schema).get(part) if is_dataclass(schema) else None
    if schema is bool:
        return ["true", "false"]
    return list(schema.__members__) if isinstance(schema, EnumMeta) else []


def explain(error: Exception, command: str, words: Sequence[str]) -> str:
    """What Hydra says of a mistake in one paragraph, with what is nearest.

    Args:
        error: Hydra's or OmegaConf's.
        command: one of `CONFIGS`.
        words: the command line after it.
    """
    text, cause = _flat(error), _flat(error.__cause__ or "")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        hint = nearest(f"{group}={option}", [f"{group}={o}" for o in error.options])
        return f"there is no {group}={option}.{hint} {group} is one of {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        return _explain_unread(error, command, words)
    # Two texts of Hydra's, of model=a,b and of lr=range(1, 3).
    if several := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", text):
        return (
            f"{several[1]} gives several values, and so several jobs, which takes -m: "
            f"ich {command} -m ... For one value that is a list, write key=[a,b]; for one text "
            f"with commas, quote it: {_mended_command(command, words, [several[1]])}"
        )
    override = re.search(r"Could not (?:override|delete from config\.) '(.+?)'", text)
    if override or re.match("Key '.*' (not in|is not in)", cause):
        key = override[1] if override else text.split()[-1].lstrip("+").split("=")[0]
        return _explain_unknown(key, command, words)
    if override := re.search(r"Error merging override (.+)", text):
        allowed = re.search(r"expected one of \[(.*)\]", cause)
        key, _, value = override[1].partition("=")
        hint = nearest(value, allowed[1].split(", ")) if allowed else ""
        return f"{override[1]} does not fit: {cause or text}.{hint}"
    said = (text if cause in text else f"{text} {cause}").rstrip(".")
    more = "" if isinstance(error, _TOLD) else f" {keep_traceback()}"
    if unknown := re.search(r"In '.*Key '(\w+)' (?:is )?not in", said):  # in a YAML file
        more = _nearest_setting(unknown[1], *_names(command, words))
    return f"the settings cannot be used: {said}.{more}"


def _explain_unread(error: OverrideParseException, command: str, words: Sequence[str]) -> str:
    """Of a word that is no key=value."""
    if "=" in error.override:
        # As for the folder of a job, whose name has commas and equal signs.
        return (
            f"{error.override} cannot be read as key=value ({_flat(error.message.splitlines()[0])})"
            f". If the value is one text, quote it for Hydra too: "
            f"{_mended_command(command, words)}"
        )
    groups, _ = _names(command, ())
    choices = {option: f"{group}={option}" for group in groups for option in groups[group]}
    found = get_close_matches(error.override, choices, 1)
    hint = f" Did you mean {choices[found[0]]}?" if found else ""
    return f"{error.override} is no key=value, such as seed=1 or data=rsna.{hint}"


def _is_read(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _explain_unknown(key: str, command: str, words: Sequence[str]) -> str:
    """Of a key that is none."""
    groups, keys = _names(command, words)
    hint = _nearest_setting(key, groups, keys)
    own = ", ".join(sorted(group for group in groups if "/" not in group))
    return (
        f"`ich {command}` has no setting {key}.{hint} Its groups are {own}; "
        f"ich {command} --cfg job shows all keys."
    )


def _nearest_setting(key: str, groups: Iterable[str], keys: Sequence[str]) -> str:
    """lr is near whatever ends so, else modle near model, else epohs near all epochs."""
    ends = [name.rpartition(".")[2] for name in keys]

    def ending(word: str) -> list[str]:
        return [name for name, end in zip(keys, ends, strict=True) if end == word][:_MEANT]

    found = ending(key) or get_close_matches(key, [*groups, *keys], 1)
    if not found and (near := get_close_matches(key, ends, 1)):
        found = ending(near[0])
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _names(command: str, words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The groups of a command with their options, and its keys, those of the chosen launcher and
    sweeper among them."""
    chosen = [word for word in words if re.fullmatch(r"hydra/(launcher|sweeper)=\w+", word)]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(CONFIGS[command][0], overrides=chosen, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        groups = {
            str(group): loader.get_group_options(group, ObjectType.CONFIG)
            for group in cfg.hydra.runtime.choices
        }
    keys: list[str] = []

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.items() if isinstance(node, dict) else ():
            keys.append(f"{prefix}{name}")
            walk(f"{prefix}{name}.", value)

    values: Any = OmegaConf.to_container(cfg)
    walk("", {k: v for k, v in values.items() if k != "hydra"} | {"hydra": values["hydra"]})
    return groups, keys


def _flat(text: object) -> str:
    """Hydra's text in one line, without where its documentation and OmegaConf's node are."""
    return " ".join(re.split(r"\s+(?:full_key:|See https:)", str(text))[0].split())
