"""What a run was made with: code, packages, hardware. Nothing that names a person or a place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ich
from ich.base.records import GitState, Hardware, Provenance

# Of the whole package, wherever in it this module stands.
_PACKAGE = Path(ich.__file__).resolve().parent
_GIT_SECONDS = 10
_MAX_DIFF = 1 << 20
# Those whose version can change a number or a file of a run.
_PACKAGES = (
    *("torch", "timm", "numpy", "pandas", "scipy", "pydicom", "safetensors", "isal"),
    *("iterative-stratification", "hydra-core", "omegaconf", "mlflow"),
)


@lru_cache  # of the code as it was loaded, though somebody edits it while a sweep runs
def code_version(package: Path = _PACKAGE) -> str:
    """A fingerprint of the package's own modules, 12 hex digits: what tells other code apart.

    Names are relative to the package, so that a module that moves within it is other code and a
    checkout at another place is not.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        # Separated, so that no other names and contents run together to the same bytes.
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def git_state(package: Path = _PACKAGE) -> GitState | None:
    """Commit of the checkout that the package lies in, and whether it was changed since.

    None for an installed package, and where git is absent or does not answer.
    """
    commit = _git(package, "rev-parse", "HEAD")
    # An environment may lie within the checkout of something else, which does not track it.
    if not commit or not _git(package, "ls-files", "--", "."):
        return None
    changed = _git(package, "status", "--porcelain", "--", ".")
    return GitState(commit.strip(), bool(changed))


def git_diff(package: Path = _PACKAGE) -> str:
    """What was changed since the commit, new files included, as `git apply` takes it; cut above
    1 MB, empty for none."""
    if git_state(package) is None:
        return ""
    # Whatever the user's git is set to: `git apply` must take it.
    plain = ("--no-color", "--no-ext-diff", "--src-prefix=a/", "--dst-prefix=b/")
    text = _git(package, "diff", *plain, "HEAD", "--", ".")
    root = Path(_git(package, "rev-parse", "--show-toplevel").removesuffix("\n"))
    new = _git(package, "ls-files", "--others", "--exclude-standard", "--full-name", "--", ".")
    for name in new.splitlines():
        path = root / name
        # Code and configuration alone: whatever else lies there may be large, or nobody's business.
        if path.is_file() and path.suffix in (".py", ".yaml", ".j2", ".css", ".js"):
            text += _as_patch(name, path.read_bytes().decode(errors="replace"))
    return text if len(text) <= _MAX_DIFF else f"{text[:_MAX_DIFF]}\n... cut at 1 MB\n"


def _as_patch(name: str, text: str) -> str:
    """A new file as a patch; git itself makes one only of what its index knows."""
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    if not text:
        return f"{head}index 0000000..e69de29\n"
    whole = text.endswith("\n")
    lines = text.removesuffix("\n").split("\n")
    added = "\n".join(f"+{line}" for line in lines)
    end = "\n" if whole else "\n\\ No newline at end of file\n"
    return f"{head}--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n{added}{end}"


def _git(folder: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=True,
            # `git status` would otherwise refresh the index, which someone may be committing.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    # Our own from the code that runs: what is installed may be of another checkout, or nothing.
    installed = {"python": platform.python_version(), "ich": ich.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def hardware() -> Hardware:
    """Processor, cores, memory (GiB), system, and the GPUs' names where nvidia-smi tells them."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(
        processor=processor(),
        cores=os.cpu_count(),
        memory_gib=round(pages / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        gpus=tuple(_gpus()),
    )


def processor(gpu: bool = False) -> str:
    """The name of this machine's processor, or of its first GPU if asked for and there is one."""
    if gpu and (gpus := _gpus()):
        return gpus[0]
    try:  # on Linux `platform.processor` is empty or names the architecture alone
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    return nvidia_smi("name,memory.total")


@lru_cache  # of the GPUs as they were first seen: a sweep asks for each of its jobs
def nvidia_smi(fields: str) -> list[str]:
    """What nvidia-smi says of each visible GPU, in their order; empty where there is none.

    Not by torch, which takes seconds to import.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible.replace(" ", "")]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.decode(errors="replace").strip().splitlines()


def record(package: Path = _PACKAGE) -> Provenance:
    """All of it, here and now."""
    return Provenance(code_version(package), git_state(package), versions(), hardware())
