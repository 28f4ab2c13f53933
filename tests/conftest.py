"""The suite is stricter than any user: shapes are checked at calls, ranks never broadcast, two devices, warnings are errors."""

import fcntl
import gc
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

# JAX reads these when it is imported, and commands that tests start as processes inherit them. Programs of tests run for
# milliseconds, and compiling them without optimisation takes a third of the time.
TEST_FLAGS = (
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
if metadata.version("jaxlib").startswith("0.10."):  # later ones may not know the flags, and an unknown one ends the process
    TEST_FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *TEST_FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

ROOT = Path(__file__).resolve().parents[1]
TINY_SOURCE = "synthetic:users=300,items=150"
FIRST_FILE = "experiments/test_evaluation_only.py"  # begins with the training of `tiny_run`
FOLDERS = ("kernels", "training", "experiments")  # kernels need no run; files of the others train, and are long


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs between runs, and check the package's array annotations with beartype."""
    gc.set_threshold(20_000, 20, 20)  # imports and tracing make so many objects that looking for garbage took a tenth of the time
    if (cache := getattr(config, "cache", None)) is not None:  # absent with `-p no:cacheprovider`
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    from jaxtyping import install_import_hook

    install_import_hook("cda4rec_jax", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has `tiny_run` trained while the others test kernels; then long files, which would leave workers idle at the end."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests")
        if path.as_posix() == FIRST_FILE:
            return 0
        return 1 + (FOLDERS.index(path.parts[0]) if path.parts[0] in FOLDERS else len(FOLDERS))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Never look for garbage among what was imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that holds the real datasets (ml-1m, amazon-beauty, ...); tests that need it are skipped without it."""
    folder = Path(os.environ.get("CDA4REC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set CDA4REC_DATA to a folder that holds ml-1m, amazon-beauty, ...")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of preset ``tiny`` on a small synthetic world, made once for all test processes: never write to it."""
    return _trained(tmp_path_factory, "tiny_run", "--preset", "tiny", "--data", TINY_SOURCE)


@pytest.fixture(scope="session")
def tiny_baseline(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SASRec on the data of ``tiny_run``, made once for all test processes: never write to it."""
    return _trained(tmp_path_factory, "tiny_baseline", "--preset", "sasrec-tiny", "--data", str(tiny_run / "data"))


def _trained(tmp_path_factory: pytest.TempPathFactory, name: str, *flags: str) -> Path:
    """A run that a process of its own trains, as a user's does: data loaders map over batches in ways that break annotations."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run / "training.json").exists():
            program = "import sys; from cda4rec_jax.cli import main; sys.exit(main())"
            arguments = ["train", *flags, "--out", str(run), "--overwrite"]
            done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return run
