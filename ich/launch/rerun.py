"""Repeats a finished run from its record: `ich rerun multirun_reports/<name>/<job>`.

Method. The run's own config, with as many CPU threads as it had, is trained again in
`multirun_reports/<name>/reruns/<job>/`, without MLflow; then the two are compared
(`ich.scoring.verdict`). Refused is what could not be the same training: other data, other initial
weights. Other code, packages or hardware are said before it starts, with the commands that bring
the code back.

The verdict is "identical", "within tolerance" or "different", and then where. On the CPU, with the
same code, packages, number of threads and kind of processor, a repeated run is identical. On a GPU
sums are not always taken in the same order, and a repeated run may be no more than similar.

The tolerance is absolute, for every metric, loss and probability. Its default, 0.001, is below what
the choice of validation rows alone does to a score: the standard error of an accuracy of 0.97 on
the report's 11,623 rows is 0.0016. Accuracy and AUC have steps, though: with few rows, one
probability that crosses 0.5, by however little, moves the accuracy by more than 0.001, and the runs
are called different; --tolerance sets another bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ich.base import provenance
from ich.base.config import Config, UserError, load_config, saved_config, to_dataclass, to_dict
from ich.base.entry import nearest, recorded_command, shell_command
from ich.base.files import DamagedError, write_json
from ich.base.naming import BY_CONTENT, identity
from ich.base.processes import EARLIER_PROCESS_SECONDS, lock_run
from ich.base.records import NOT_STARTED, FitResult, Hardware, Origin, Provenance, RunResult
from ich.base.results import RunPaths, State, SweepPaths
from ich.base.terminal import Board, Terminal, console, print_line
from ich.base.validation import validate
from ich.data.cohorts import cohort_keys, describe_data_changes
from ich.data.dataset import prepare
from ich.launch.jobs import run_job
from ich.launch.preflight import check_weights, weights_digest
from ich.scoring.verdict import Outcome, RerunComparison, compare_runs, describe

# What may be said of a rerun: where its data and weights lie now, and where it makes its slices.
_PLACES = (*BY_CONTENT, "data.cache_dir")
_CACHE_DIR = ".ich-cache"  # as in conf/data
_COLORS = {Outcome.identical: "green", Outcome.within: "green", Outcome.different: "red"}


# The run to repeat


@dataclass(frozen=True)
class Original:
    """A finished run, and what its folder and its sweep's tell of how it was made.

    provenance: empty if nothing tells. diff: what its code had changed since the commit.
    """

    run: RunPaths
    sweep: SweepPaths
    config: Config
    origin: Origin
    fit: FitResult
    provenance: Provenance
    diff: Path | None

    @property
    def rerun(self) -> RunPaths:
        return self.sweep.rerun(self.run.root.name)


def read_original(folder: Path) -> Original:
    """What is known of a finished run.

    Raises:
        UserError: there is none in the folder, or it cannot be repeated.
    """
    run, sweep = RunPaths(folder), _sweep_of(folder)
    fit = _read_fit(run, sweep)
    compare_runs(run, run, 0.0)  # files that cannot be read would otherwise be found hours later
    try:
        config = load_config(run.config)
    except DamagedError as error:
        raise UserError(
            f"{error}, so the run cannot be repeated. Put a whole copy back, or take the version "
            f"that made it: {sweep.record} and {run.provenance} name its commit."
        ) from None
    # Not where the record says, which may be somebody else's: a rerun writes there.
    config = replace(config, data=replace(config.data, cache_dir=_CACHE_DIR))
    validate(config)  # somebody may have edited it
    origin = run.read_origin()
    if not (origin.cohort and origin.weights and origin.code):
        raise UserError(
            f"{folder} has no {run.origin.name} that tells which data and weights the run was made "
            f"from, so nothing could be called its repetition. Give its sweep's command again with "
            f"name=NEW: this version of ich writes it."
        )
    return Original(run, sweep, config, origin, fit, *_read_provenance(run, sweep, origin))


def _sweep_of(folder: Path) -> SweepPaths:
    """The sweep that a run belongs to, superseded runs too.

    Raises:
        UserError: the folder is a sweep, or a rerun.
    """
    above = folder.absolute().parent
    if _is_subfolder(above, "reruns") or _is_subfolder(above.parent, "reruns"):
        raise UserError(
            f"{folder} is a rerun itself. Give the run that it repeats, to repeat that once more."
        )
    if jobs := SweepPaths(folder).read_record().jobs:
        raise UserError(
            f"{folder} is a sweep. Give one of its runs, as in "
            f"{shell_command('ich', 'rerun', folder / jobs[0])}; it has {', '.join(jobs)}."
        )
    return SweepPaths(folder.parent.parent if _is_subfolder(above, "superseded") else folder.parent)


def _is_subfolder(folder: Path, name: str) -> bool:
    """Whether a folder is one of a sweep's own, and not a sweep of that name."""
    return folder.name == name and not SweepPaths(folder).record.exists()


def _read_fit(run: RunPaths, sweep: SweepPaths) -> FitResult:
    """What the run's training came to.

    Raises:
        UserError: there is no run, or it did not finish.
    """
    if not run.config.exists():
        raise UserError(
            f"{run.root} holds no run (no {run.config.name}). Give the folder of a finished run, "
            f"as in ich rerun multirun_reports/demo/resnet50."
        )
    result = run.read_result()
    if result.fit:
        return result.fit
    reason = result.reason or ("it has no result" if result.status == NOT_STARTED else "")
    command = recorded_command(sweep.read_record().command)
    raise UserError(
        f"the run in {run.root} did not finish, and only a finished run can be repeated. It is "
        f"{result.status}{f': {reason}' if reason else ''}. Give its sweep's command again, "
        f"which goes on with it: {command}"
    )


def _read_provenance(
    run: RunPaths, sweep: SweepPaths, origin: Origin
) -> tuple[Provenance, Path | None]:
    """What the run was made with, and the changes of its code since the commit."""
    if (provenance := run.read_provenance()) != Provenance():
        return provenance, run.diff if run.diff.exists() else None
    # Earlier versions wrote it for the sweep alone, whose record is of its latest launch: that
    # tells of this run only if it had the same code.
    launch = sweep.read_record().provenance
    if launch.code != origin.code:
        return Provenance(), None
    return launch, sweep.diff if sweep.diff.exists() and sweep.diff.stat().st_size else None


def moved(original: Original, places: Sequence[str]) -> Original:
    """The run, of data and weights that lie elsewhere now: `data.root=PATH` and the like, and with
    another folder for what is made of them, `data.cache_dir=PATH`.

    Raises:
        UserError: another setting is given, with which it would be another training.
    """
    values = to_dict(original.config)
    for word in places:
        key, equals, path = word.partition("=")
        if not equals or key not in _PLACES:
            hint, known = nearest(key, _PLACES), ", ".join(f"{k}=PATH" for k in _PLACES)
            raise UserError(
                f"{word} is no place that a rerun takes.{hint} It repeats a run as it was; only "
                f"where its data and weights lie now can be said: {known}."
            )
        group, _, name = key.partition(".")
        values[group][name] = path
    return replace(original, config=to_dataclass(values))


def require_same_start(original: Original) -> None:
    """Data and initial weights must be those of the run.

    Raises:
        UserError: they are not, or are not there.
    """
    origin = original.origin
    here = f"Paths that are not absolute are looked up in this folder, {Path.cwd()}."
    cohort = cohort_keys({"": original.config})[""]
    if cohort != origin.cohort:
        changes = describe_data_changes(original.config, origin.cohort, cohort)
        raise UserError(
            f"the data are not those that {original.run.root} was made from: their fingerprint was "
            f"{origin.cohort} and is {cohort} ({'; '.join(changes)}). It tells the bytes of the "
            f"CSVs, and names, sizes and bytes of the labelled files, wherever they lie. {here} "
            f"Say where the data are with data.root=PATH and data.labels=FILE after the run's "
            f"folder; if they did change, only a new sweep can tell what that means."
        )
    digest = weights_digest(original.config.model)
    if digest != origin.weights:
        raise UserError(
            f"the initial weights are not those that {original.run.root} was made from: they were "
            f"{origin.weights} and are {digest} (model.weights is "
            f"{original.config.model.weights!r}). {here} Put the file back that the "
            f"run began with."
        )


# What differs between the record and now


def list_changes(original: Original, now: Provenance, device: str) -> list[str]:
    """What differs between the run's record and now, a sentence each; none of it is a refusal.

    Args:
        original: the run.
        now: what the rerun is made with.
        device: where the rerun will train, as a run's result names it.
    """
    return [
        *_config_changes(original),
        *_code_changes(original, now),
        *_version_changes(original.provenance, now),
        *_hardware_changes(original, now, device),
        *_thread_changes(original.fit, now),
    ]


def _config_changes(original: Original) -> Iterator[str]:
    """A config.yaml that was edited, or a later launch that has not come to this job."""
    recorded = original.sweep.read_record().configs.get(original.run.root.name)
    try:
        launched = identity(saved_config(recorded, "the sweep's record")) if recorded else {}
    except DamagedError:  # or of another version of ich
        return
    own = identity(original.config)
    name = original.run.config.name
    for key, value in own.items():
        if launched.get(key, value) != value:
            yield f"{key}: {launched[key]} in the sweep's record, {value} in {name}, which counts."


def _code_changes(original: Original, now: Provenance) -> Iterator[str]:
    code, provenance = original.origin.code, original.provenance
    if code == now.code:
        return
    text = f"code of ich: {code} then, {now.code} now; it was "
    if provenance.commit:
        changed = f", with the changes in {original.diff.name}" if original.diff else ""
        yield f"{text}commit {provenance.commit}{changed}."
    else:
        version = provenance.versions.get("ich", "unknown")
        yield f"{text}version {version}, of no recorded commit."


def restore_commands(original: Original) -> str | None:
    """The commands that bring the run's code back into a checkout, None if no commit is known."""
    commit = original.provenance.commit
    # A record may be somebody else's: what is no commit might be an option of git's.
    if not commit or not re.fullmatch("[0-9a-f]{7,64}", commit):
        return None
    patch = original.diff and shell_command("git", "apply", original.diff.absolute())
    return shell_command("git", "checkout", commit) + (f" && {patch}" if patch else "")


def _version_changes(provenance: Provenance, now: Provenance) -> Iterator[str]:
    if provenance == Provenance():
        yield "packages and hardware: not recorded, or replaced by a later launch with other code."
        return
    for name in dict.fromkeys([*provenance.versions, *now.versions]):
        before, after = (v.get(name, "none") for v in (provenance.versions, now.versions))
        if before != after:
            yield f"{name}: {before} then, {after} now."


def _hardware_changes(original: Original, now: Provenance, device: str) -> Iterator[str]:
    # "CPU, 2 threads": the threads have a line of their own.
    before, after = (d.partition(",")[0] for d in (original.fit.device, device))
    if before != after:
        yield f"device: {before} then, {after} now."
    if original.provenance.hardware and now.hardware:
        old, new = map(_deciding, (original.provenance.hardware, now.hardware))
        for name, value in old.items():
            if value != new[name]:
                yield f"{name}: {value} then, {new[name]} now."


def _deciding(hardware: Hardware) -> dict[str, str]:
    """Of a machine, what a sum may depend on: not its memory, nor its system."""
    gpus = ", ".join(hardware.gpus) or "none"
    return {"processor": hardware.processor, "cores": str(hardware.cores), "gpus": gpus}


def _thread_changes(fit: FitResult, now: Provenance) -> Iterator[str]:
    threads, cores = fit.threads, now.hardware and now.hardware.cores
    if threads is None:
        yield (
            f"threads: not recorded as a number ({fit.device}); the last digits may differ. "
            f"This rerun takes as many as the config says, or torch chooses."
        )
    elif cores and threads > cores:
        yield f"threads: {threads} as then, on {cores} cores: slower, but the same sums."


# The rerun


def train_again(original: Original, now: Provenance) -> RunResult:
    """Trains the run again in the rerun's folder, and returns the result.

    A rerun that was killed goes on. One that finished, or began with other code or packages, is
    kept in `reruns/superseded/`.

    Raises:
        UserError: another rerun of the same sweep is under way.
    """
    run, config = original.rerun, rerun_config(original)
    # With the mode it records: on a processor like the run's, the rerun computes in the same
    # precision and layout.
    origin = replace(original.origin, code=now.code)
    run.root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_run(RunPaths(original.sweep.reruns), 0))
            # Of a rerun whose supervisor was killed, the training itself may still be ending. Its
            # lock is given back at once: the training that is started below takes it.
            with lock_run(run, EARLIER_PROCESS_SECONDS):
                pass
        except BlockingIOError:
            raise UserError(
                f"another rerun is under way in {original.sweep.reruns}. Wait for it."
            ) from None
        done = run.state(config, origin) is State.done
        if run.config.exists() and (done or not _began_alike(run, now)):
            why = "finished" if done else "began with other code or packages"
            print_line(f"The rerun that {why} is kept in {run.root.parent / 'superseded'}.")
            run.supersede()
        board = stack.enter_context(Board([config.job]))
        watch = board.started(config, run, "")
        result = run_job(config, run, origin, None, watch)
        board.ended(config, result, before=False)
    return result


def rerun_config(original: Original) -> Config:
    """The run's config, with the threads it had; without MLflow, where it stands already."""
    config, threads = original.config, original.fit.threads
    # Sums of floating-point numbers depend on how many threads share them.
    train = replace(config.train, threads=threads or config.train.threads)
    return replace(config, train=train, tracking=replace(config.tracking, mlflow=False))


def _began_alike(run: RunPaths, now: Provenance) -> bool:
    """Whether what lies in a rerun's folder is of this code and these packages."""
    before = run.read_provenance()
    return (before.code, before.versions) == (now.code, now.versions)


def rerun(folder: Path, tolerance: float, places: Sequence[str] = ()) -> bool:
    """Repeats a run and compares; True if it is the same, within tolerance.

    Args:
        folder: the run's.
        tolerance: see above.
        places: where its data and weights lie now, see `moved`.

    Raises:
        UserError: there is nothing to repeat, or not from the same start.
    """
    if folder.name in ("", ".."):  # the run's name is its folder's
        folder = folder.resolve()
    # What can be refused at once, before data are decoded and a training takes its hours.
    original = moved(read_original(folder), places)
    require_same_start(original)
    check_weights([original.config])
    # Once, before the training: the rerun is of this code, whatever is edited meanwhile.
    now = provenance.record()
    differences = list_changes(original, now, _device(original.config))
    _print_changes(original, now, differences)
    with Terminal().preparing() as report:
        prepare(original.config, report).require_rows()
    result = train_again(original, now)
    if not result.is_finished:
        log = original.rerun.log
        print_line(
            f"The rerun is {result.status}; its log is {log}. The same command goes on with it."
        )
        return False
    # A training takes hours, and sweeps go on.
    if read_original(folder).fit != original.fit:
        raise UserError(f"{folder} was replaced by another run meanwhile: nothing to compare with.")
    comparison = compare_runs(original.run, original.rerun, tolerance)
    write_json(original.rerun.comparison, _comparison_to_json(original, comparison, differences))
    _print_comparison(original, comparison)
    return comparison.outcome is not Outcome.different


def _device(config: Config) -> str:
    # Imported here: torch takes seconds, which a mistake need not wait for.
    from ich.training.devices import device_name, pick_device

    return device_name(pick_device(config.train.device))


def _comparison_to_json(
    original: Original, comparison: RerunComparison, differences: list[str]
) -> dict[str, object]:
    """The comparison as JSON holds it."""
    parts = [asdict(part) for part in comparison.parts]
    return {
        "job": original.config.job,
        "verdict": comparison.outcome.value,
        "tolerance": comparison.tolerance,
        "parts": parts,
        "changes": differences,
    }


def _print_changes(original: Original, now: Provenance, differences: list[str]) -> None:
    print_line(f"{original.run.root} is repeated in {original.rerun.root}.")
    here, then = original.config.data.cache_dir, original.run.setting("data.cache_dir")
    if then != here:
        print_line(f"Slices are kept in {here}; those of the run were in {then}.")
    if not differences:
        print_line("Code, packages, hardware and threads are those of its record.")
        return
    print_line("Since it was made, these have changed, and may change its last digits or more:")
    for line in differences:
        print_line(f"  {line}")
    commands = restore_commands(original)
    if commands and original.origin.code != now.code:
        print_line(f"That code again, in the topmost folder of its checkout: {commands}")


def _print_comparison(original: Original, comparison: RerunComparison) -> None:
    color, word = _COLORS[comparison.outcome], comparison.outcome.value
    is_exact = comparison.outcome is Outcome.identical
    limit = "" if is_exact else f" (tolerance {comparison.tolerance:g})"
    console.print()
    print_line((word, f"bold {color}"), limit)
    for line in describe(comparison):
        print_line(f"  {line}")
    print_line(f"In full: {original.rerun.comparison}")
