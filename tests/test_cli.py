"""The command line: what bad input gets (one message, exit code 2, nothing lost), and what good input gets."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cda4rec_jax
from cda4rec_jax.cli import main
from cda4rec_jax.cli.bench import BenchDispatch, BenchKernels, BenchPlan, BenchRank, BenchRequest, BenchRetrieval, BenchTrain
from cda4rec_jax.cli.commands import COMMANDS
from cda4rec_jax.cli.plan import PlanDiff, PlanExplain, PlanRecord, PlanReplay
from cda4rec_jax.cli.quickstart import unused
from cda4rec_jax.cli.train import Train
from cda4rec_jax.data import load_prepared
from cda4rec_jax.data.text_vectors import load_text_vectors
from cda4rec_jax.presets import preset
from cda4rec_jax.privacy.ledger import Ledger
from cda4rec_jax.runs import RunDirectory
from cda4rec_jax.runs.artifacts import load_corpus
from cda4rec_jax.training import Interrupted
from tests.data.tiny_bert import write_tiny_bert

HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
ROWS = "".join(f"u{user}\ti{item}\t{item}\n" for user in range(8) for item in range(8))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; gives exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(cli: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that must fail as bad input does; gives the one message, its spaces made single."""

    def run(*arguments: object) -> str:
        code, _, err = cli(*arguments)
        assert code == 2, err
        assert err.strip() and "Traceback" not in err
        assert err.count("cda4rec: ") == 1
        return " ".join(err.split())

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a RecBole folder with this .inter file."""

    def write(inter: str | bytes) -> Path:
        path = tmp_path / "shop"
        path.mkdir(exist_ok=True)
        (path / "shop.inter").write_bytes(inter if isinstance(inter, bytes) else inter.encode())
        return path

    return write


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run that a test may try to damage."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


BAD_DATA = {
    "missing columns": (
        "user_id:token\ttimestamp:float\nu1\t3\n",
        "missing column item_id; expected user_id, item_id, timestamp",
    ),
    "empty file": ("", "shop.inter"),
    "no line after the header": (HEADER, "the file is empty"),
    "one user": (HEADER + "".join(f"u1\ti{item}\t{item}\n" for item in range(9)), "one user"),
    "users with fewer than 3 events": (HEADER + "u1\ta\t1\nu1\tb\t2\nu2\ta\t1\nu2\tb\t2\n", "3 or more events"),
    "NaN timestamps": (HEADER + ROWS + "u1\ti9\tnan\n", "line 66: timestamp must be a finite number, found 'nan'"),
}


FEW_USERS = HEADER + "".join(f"u{user}\ti{item}\t{item}\n" for user in range(12) for item in range(30))
FEW_ITEMS = HEADER + "".join(f"u{user}\ti{item % 3}\t{item}\n" for user in range(30) for item in range(9))


@pytest.mark.parametrize(("text", "sizes"), [(FEW_USERS, "12 users and 30 items"), (FEW_ITEMS, "30 users and 3 items")])
def test_too_little_data_for_both_agents_is_refused_and_no_run_is_lost(
    text: str, sizes: str, folder: Callable[..., Path], refused: Callable[..., str], run_copy: Path
) -> None:
    before = contents(run_copy)
    message = refused("train", "--preset", "tiny", "--data", folder(text), "--out", run_copy, "--overwrite")
    assert f"{sizes} are too few for both agents" in message and "at least 20 users and 21 items" in message
    assert contents(run_copy) == before
    assert sorted(path.name for path in run_copy.parent.iterdir()) == ["run", "shop"], "something was left behind"


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_and_neither_dataset_nor_run_is_lost(
    name: str, folder: Callable[..., Path], refused: Callable[..., str], run_copy: Path
) -> None:
    text, message = BAD_DATA[name]
    source, before = folder(text), contents(run_copy)
    assert message in refused("prepare", source, "--out", run_copy / "data")
    assert message in refused("train", "--preset", "tiny", "--data", source, "--out", run_copy, "--overwrite")
    assert message in refused("quickstart", "--data", source, "--out", run_copy)
    assert contents(run_copy) == before
    assert sorted(path.name for path in run_copy.parent.iterdir()) == ["run", "shop"], "something was left behind"


def test_a_malformed_line_in_a_million_is_named_by_its_number(folder: Callable[..., Path], refused: Callable[..., str]) -> None:
    lines = b"u1\ti1\t5\n" * 999_999
    message = refused("prepare", folder(HEADER.encode() + lines + b"u1\ti1\n" + b"u2\ti2\t5\n"), "--out", "unused")
    assert "shop.inter, line 1000001: expected 3 fields separated by tab, found 2" in message


def test_an_unknown_user_is_refused(refused: Callable[..., str], tiny_run: Path) -> None:
    assert "'nobody'" in refused("recommend", "--run", tiny_run, "--user", "nobody")


def test_a_slate_longer_than_the_catalogue_is_refused(refused: Callable[..., str], tiny_run: Path) -> None:
    assert "1000" in refused("recommend", "--run", tiny_run, "--user", "user-001", "-k", 1000)
    assert "0" in refused("recommend", "--run", tiny_run, "--user", "user-001", "-k", 0)


@pytest.mark.parametrize("command", ["evaluate --run", "recommend --user user-001 --run", "train --resume --out"])
def test_a_run_of_another_version_is_refused_and_stays(command: str, refused: Callable[..., str], run_copy: Path) -> None:
    config = json.loads((run_copy / "config.json").read_text())
    (run_copy / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    before = contents(run_copy)
    assert "has run format 99, this version of cda4rec_jax reads format 2" in refused(*command.split(), run_copy)
    assert contents(run_copy) == before


def test_a_folder_that_is_no_run_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "is not a run directory" in refused("evaluate", "--run", tmp_path)
    assert "There is no run at" in refused("recommend", "--run", tmp_path / "none", "--user", "u")


def test_an_unwritable_directory_is_refused(refused: Callable[..., str], tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    below = tmp_path / "file" / "below"  # not even root can write there
    world = "synthetic:users=30,items=64"
    assert "annot" in refused("prepare", world, "--out", below)
    assert "annot" in refused("train", "--preset", "tiny", "--data", world, "--out", below)
    assert "annot" in refused("quickstart", "--data", world, "--out", below)
    assert "annot write" in refused("evaluate", "--run", tiny_run, "--json", below / "results.json")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_planner_is_not_trained_for_a_place_that_cannot_be_written(
    refused: Callable[..., str], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cda4rec_jax.training.planner_run.planner_examples", interrupted)
    (tmp_path / "file").write_text("precious")
    message = refused("train-planner", "--run", tiny_run, "--out", tmp_path / "file" / "below")
    assert f"{tmp_path}/file is no folder that can be written" in message


@pytest.mark.parametrize("what", ["plan --run", "rank --run", "request --run", "retrieval --run", "train --data"])
def test_a_benchmark_of_nothing_leaves_no_folder(what: str, refused: Callable[..., str], tmp_path: Path) -> None:
    refused("bench", *what.split(), tmp_path / "none", "--out", tmp_path / "bench")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_a_pattern_is_refused_before_weights_are_lost_below_it(
    refused: Callable[..., str], tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run [1]"
    for command in ("train --preset tiny --data synthetic:users=30,items=64", f"train-planner --run {tiny_run}"):
        assert "run [1] holds one of [ * ?" in refused(*command.split(), "--out", out)
    assert not list(tmp_path.iterdir())


def test_a_budget_is_refused_for_what_is_wrong_with_it(refused: Callable[..., str]) -> None:
    evaluate = ("evaluate", "--run", "nowhere")
    assert "at 0.0 requests a day" in refused(*evaluate, "--budget", "calls=3", "--requests-per-day", 0)
    for budget in ((), ("--budget", "exposure=0.2")):
        assert "add --budget calls=NUMBER" in refused(*evaluate, *budget, "--requests-per-day", 5)


def test_a_run_is_replaced_only_when_asked(refused: Callable[..., str], run_copy: Path) -> None:
    before = contents(run_copy)
    message = refused("train", "--preset", "tiny", "--data", "synthetic:users=30,items=64", "--out", run_copy)
    assert "already holds a run" in message and "--resume" in message and "--overwrite" in message
    assert contents(run_copy) == before


def test_resume_takes_no_settings_and_needs_a_run(refused: Callable[..., str], tiny_run: Path, tmp_path: Path) -> None:
    assert "--resume goes on as the run began" in refused("train", "--resume", "--out", tiny_run, "--epochs", 3)
    assert "There is no run at" in refused("train", "--resume", "--out", tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sampled-items 64", "add --loss sampled, or leave it out"),
        ("--sampled-items 64 --loss in-batch", "add --loss sampled, or leave it out"),
        ("--loss sampled --sampled-items 0", "--sampled-items must be above 0, got 0"),
        ("--label-smoothing 1", "--label-smoothing must be less than 1"),
        ("--label-smoothing -0.1", "--label-smoothing must be 0 or more, got -0.1"),
    ],
)
def test_a_loss_is_refused_for_what_is_wrong_with_it(
    flags: str, message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert message in refused("train", "--preset", "tiny", "--out", tmp_path / "run", *flags.split())
    assert not list(tmp_path.iterdir())


def test_the_loss_of_the_flags_is_that_of_the_configuration() -> None:
    asked = Train(preset="sasrec-tiny", loss="sampled", sampled_items=64, label_smoothing=0.1)
    train = asked._configured(asked._changes()).train
    assert (train.loss, train.sampled_items, train.label_smoothing) == ("sampled", 64, 0.1)
    assert Train(preset="sasrec-tiny")._configured({}).train == preset("sasrec-tiny", "synthetic").train


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("train --epoch 3", "--epochs"),
        ("train --over-write", "--overwrite"),
        ("recommend --run x --user y --links wifi", "--link"),
        ("evaluate --run x --basline y", "--baseline"),
        ("prepare x --out y --kcore 3", "--k-core"),
        ("encode x --model y --out z.npz --dimension 9", "--dimensions"),
        ("quickstart --dta x", "--data"),
    ],
)
def test_a_typo_in_a_flag_gets_the_right_one_suggested(
    arguments: str, suggestion: str, cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = cli(*arguments.split())
    assert code == 2
    assert "Perhaps you meant" in err and suggestion in err.split("Perhaps you meant")[1]


@pytest.mark.parametrize("arguments", ["", "trian", "recommend --user u", "recommend --run x --user y --link 4g"])
def test_other_mistakes_on_the_command_line_exit_with_code_2(arguments: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli(*arguments.split())
    assert code == 2 and err.strip() and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --epochs many", "got 'many', expected a whole number"),
        ("train --learning-rate fast", "got 'fast', expected a number"),
        ("recommend --run x --user y -k 2.5", "got '2.5', expected a whole number"),
        ("train --compute-dtype half", "Expected one of ('auto', 'float32', 'bfloat16')"),
        ("train --out=~nobody-has-this-name/run", "expected a path of a user that exists"),
    ],
)
def test_a_word_of_the_wrong_kind_is_told_with_what_was_expected(
    arguments: str, expected: str, cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = cli(*arguments.split())
    assert code == 2 and expected in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --preset tinny", "did you mean 'tiny'?"),
        ("train --data synthetic:user=3", "did you mean 'users'?"),
        ("train --data nowhere", "'nowhere' does not exist"),
        ("train --epochs 0", "--epochs must be above 0, got 0"),
        ("train --seed -1", "--seed must be 0 or more, got -1"),
        ("train --max-minutes nan", "--max-minutes must be above 0, got nan"),
        ("prepare synthetic --out x --k-core 0", "--k-core must be above 0, got 0"),
        ("train --resident-items 0", "--resident-items must be above 0, got 0"),
        ("encode synthetic --model m --out x.npz --dimensions 0", "--dimensions must be above 0, got 0"),
        ("encode synthetic --model m --out x.npz --tfidf -3", "--tfidf must be above 0, got -3"),
        ("encode synthetic --model m --out x.npy", "ends in .npz"),
        ("encode synthetic --model m --out x.npz", "there is no model folder m: expected a folder with config.json"),
        (
            "train --preset tiny --text none.npz --out run",
            "none.npz: the file does not exist; make the file with 'cda4rec encode",
        ),
        ("train --preset sasrec-tiny --text x.npz --out run", "trains on ids alone and would not read x.npz"),
        ("train --resume --text x.npz", "--resume goes on as the run began"),
        ("train --resume --planner m:P", "--resume goes on as the run began"),
        ("train --resume --out r --preset ml-1m", "leave --preset and --data out"),
        ("train --resume --out r --data ml-1m", "leave --preset and --data out"),
        ("train --preset tiny --planner nowhere:Planner", "there is no module 'nowhere'; start from the folder that holds it"),
        ("train --preset sasrec-tiny --planner m:P", "a baseline has one agent and plans nothing: leave the planner m:P out"),
        ("train --preset sasrec-tiny --resident-items 200", "no device: leave --resident-items out"),
        ("train --resume --resident-items 200", "--resume goes on as the run began"),
        ("train --resume --rows-per-batch 8", "--resume goes on as the run began"),
        ("train --accumulation-steps 0", "--accumulation-steps must be above 0, got 0"),
        ("train --preset tiny --accumulation-steps 5", "choose --rows-per-batch as a multiple of 5"),
        (
            "train --preset tiny --rows-per-batch 15 --mesh data=2",
            "choose --rows-per-batch as a multiple of 2, or a mesh with data=1",
        ),
        ("train --preset tiny --mesh rows=2", "expected data=N, items=N, or data=N,items=N"),
        ("train --preset tiny --mesh data=64", "takes 64 devices: choose sizes whose product is at most 2"),
        ("train --mesh data=2 --coordinator localhost:1", "--coordinator, --num-processes and --process-id go together"),
        ("train --distributed", "add --mesh, such as --mesh data=2"),
        ("train --mesh data=2 --coordinator h:1 --num-processes 2 --process-id 2", "--process-id must be 0 to 1"),
    ],
)
def test_bad_values_are_refused(
    arguments: str, message: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments.split())
    assert not list(tmp_path.iterdir())


OF_PLAN = {"plan explain": PlanExplain, "plan record": PlanRecord, "plan replay": PlanReplay, "plan diff": PlanDiff}
OF_BENCH = {
    f"bench {kind.__name__.removeprefix('Bench').lower()}": kind
    for kind in (BenchTrain, BenchPlan, BenchRank, BenchRetrieval, BenchKernels, BenchRequest, BenchDispatch)
}
WITH_FLAGS = {**COMMANDS, **OF_BENCH, **OF_PLAN}
del WITH_FLAGS["bench"], WITH_FLAGS["plan"]  # have sub-commands alone


@pytest.mark.parametrize("command", WITH_FLAGS)
def test_every_flag_of_every_command_is_explained(command: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli(*command.split(), "--help")
    assert code == 0 and not err
    shown = "".join(out.replace("│", " ").split())  # without spaces, since long words are cut where a line ends
    body = ast.parse(inspect.getsource(WITH_FLAGS[command])).body[0]
    assert isinstance(body, ast.ClassDef)
    flags = [(field, text) for field, text in pairwise(body.body) if isinstance(field, ast.AnnAssign)]
    assert len(flags) >= 2 and "None" not in shown
    assert "default:True" not in shown, "beside a --no-flag, which turns it off, that reads as if it were off"
    for field, text in flags:
        assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), f"line {field.lineno} has no explanation"
        assert "".join(str(text.value.value).split()) in shown


def test_the_installed_command_prints_its_version_without_loading_jax() -> None:
    program = "import sys; from cda4rec_jax.cli import main; code = main(['--version']); sys.exit(code or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cda4rec {cda4rec_jax.__version__}\n", "")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_output_that_nobody_reads_ends_the_command_silently(flag: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "from cda4rec_jax.cli import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", program, flag], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_a_full_disk_is_told_in_one_line(flag: str) -> None:
    program = "from cda4rec_jax.cli import main; raise SystemExit(main())"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program, flag], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "cda4rec: No space left on device: free some, or write elsewhere\n")


def test_prepare_reports_what_it_dropped(
    folder: Callable[..., Path], cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    source = folder(HEADER + ROWS + "short\ti1\t5\n")
    code, out, err = cli("prepare", source, "--out", tmp_path / "prepared")
    assert (code, err) == (0, "")
    assert "dropped 1 users: fewer than 3 events (short" in out and "8 users, 8 items, 64 interactions" in out
    assert (tmp_path / "prepared" / "metadata.json").is_file()


def test_recommend_prints_one_slate_online_and_offline(cli: Callable[..., tuple[int, str, str]], tiny_run: Path) -> None:
    for link in ("wifi", "offline"):
        code, out, err = cli("recommend", "--run", tiny_run, "--user", "user-001", "--link", link, "-k", 5, "--json")
        assert (code, err) == (0, "")
        assert len(json.loads(out)["slate"]) == 5


def test_the_ledger_of_several_requests_is_in_the_file_that_was_named(
    cli: Callable[..., tuple[int, str, str]], refused: Callable[..., str], tiny_run: Path, tmp_path: Path
) -> None:
    file, asked = (
        tmp_path / "sent.sqlite",
        ("recommend", "--run", tiny_run, "--user", "user-001", "--plan", "fresh-recent-20-skip", "--json"),
    )
    told = [json.loads(cli(*asked, "--ledger", file)[1]) for _ in range(2)]
    with closing(Ledger(file)) as ledger:
        entries = ledger.entries()
    assert [entry.payload_bytes > 0 and entry.sends for entry in entries] == [1, 1]
    assert all(answer["plan"]["executed"] == "fresh-recent-20-skip" for answer in told)
    file.write_bytes(b"no database")
    assert "no writable SQLite ledger" in refused(*asked, "--ledger", file)


def test_quickstart_takes_a_number_where_the_place_is_taken(tmp_path: Path) -> None:
    assert unused(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert unused(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run-2").write_text("a file")
    assert unused(tmp_path / "run") == tmp_path / "run-3"


SHOP = "synthetic:users=60,items=80"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of a small world, by an encoder whose folder is gone."""
    folder = tmp_path_factory.mktemp("encoded")
    model = write_tiny_bert(folder / "tiny-bert")
    arguments = ("encode", SHOP, "--model", model, "--out", folder / "vectors.npz", "--dimensions", 8, "--tfidf", 4)
    assert main([str(argument) for argument in arguments]) == 0
    shutil.rmtree(model)
    return folder / "vectors.npz"


def test_encode_refuses_bad_data_and_keeps_what_was_there(
    encoded: Path, refused: Callable[..., str], folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, before = write_tiny_bert(tmp_path / "tiny-bert"), encoded.read_bytes()
    assert "the file is empty" in refused("encode", folder(HEADER), "--model", model, "--out", encoded, "--dimensions", 8)
    assert "take 1 to 16 dimensions, not 17" in refused("encode", SHOP, "--model", model, "--out", encoded, "--dimensions", 17)
    (model / "tokenizer.json").unlink()
    assert "lacks tokenizer.json" in refused("encode", SHOP, "--model", model, "--out", encoded)
    assert encoded.read_bytes() == before


def test_training_keeps_the_vectors_of_a_file_and_their_origin(
    encoded: Path, cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cda4rec_jax.training.job.measure_exposure", interrupted)
    code, _, err = cli("train", "--preset", "tiny", "--data", SHOP, "--text", encoded, "--k-core", 12, "--out", tmp_path / "run")
    assert code == 130 and "the run is saved" in err
    run = RunDirectory.open(tmp_path / "run")
    vectors, interactions = load_text_vectors(encoded), load_prepared(run.data_folder)
    assert interactions.num_items < len(vectors.item_ids)
    text = load_corpus(run).text
    assert not text[0].any()
    np.testing.assert_array_equal(text[1:], vectors.rows(interactions))
    assert run.read_config("text", dict) == {
        "provider": "tiny-bert-8+tfidf-svd-4",
        "model_fingerprint": vectors.model_fingerprint,
    }


def interrupted(*_: object, **__: object) -> None:
    raise Interrupted


def test_a_run_below_the_home_folder_is_found_by_every_command(
    cli: Callable[..., tuple[int, str, str]], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("cda4rec_jax.training.job.measure_exposure", interrupted)
    for how in (("--preset", "tiny", "--data", SHOP), ("--resume",)):
        code, _, err = cli("train", *how, "--out=~/run")
        assert code == 130 and f"cda4rec train --out {tmp_path}/run --resume" in " ".join(err.split())
    for command in ("evaluate", "calibrate", "recommend --user u", "plan explain --user u", "train-planner", "bench rank"):
        assert f"There is no run at {tmp_path}/none" in refused(*command.split(), "--run=~/none")


def test_stopping_before_a_new_run_began_says_that_the_old_one_stays(
    cli: Callable[..., tuple[int, str, str]], run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_copy)
    overwrite = ("train", "--preset", "tiny", "--data", SHOP, "--out", run_copy, "--overwrite")
    monkeypatch.setattr("cda4rec_jax.training.job.prepare", interrupted)
    code, _, err = cli(*overwrite)
    assert code == 130 and f"before the new run began; the run in {run_copy} stays as it was" in " ".join(err.split())
    assert contents(run_copy) == before
    monkeypatch.undo()
    monkeypatch.setattr("cda4rec_jax.training.job.measure_exposure", interrupted)
    code, _, err = cli(*overwrite)
    assert code == 130 and "the run is saved" in err


@pytest.mark.parametrize(
    ("world", "message"),
    [
        ("users=60,items=120", "items of synthetic have no vector (item-001, "),
        ("users=60,items=80,seed=3", "items of synthetic had another title or other categories (item-01, "),
    ],
)
def test_vectors_of_other_items_are_refused_and_no_run_is_lost(
    world: str, message: str, encoded: Path, refused: Callable[..., str], run_copy: Path
) -> None:
    before = contents(run_copy)
    other = ("--data", f"synthetic:{world}", "--text", encoded, "--out", run_copy, "--overwrite")
    assert message in refused("train", "--preset", "tiny", *other)
    assert contents(run_copy) == before
    assert [path.name for path in run_copy.parent.iterdir()] == ["run"], "something was left behind"
