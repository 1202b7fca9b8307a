"""Settings: precedence, notices, --help, and every bad input: one clear line, exit 1, nothing left behind."""

import dataclasses
import json
import re
import shutil

import pytest
from conftest import TINY, assert_refused, run_cli, run_in_process, tree, within

# (flags, regular expressions that the one line must hold). Each line names the setting, says what was expected and what
# was found; where the remedy does not follow from that, it states it.
BAD_SETTINGS = {
    "flag mistyped": ("--num_head=4", "num_head", r"--num_heads"),
    "flag without dashes": ("num_heads=4", "num_heads=4", r"--num_heads"),
    "flag of one letter": ("-x", "-x", r"--help|--\w+="),
    "flag without value": ("--num_heads", "num_heads", "expected a value", r"--num_heads="),
    "flag of the official script": ("--num_loops=3", "num_loops", "LAYOUT=5x3"),
    "flag of the official script with a near name": ("--num_layers=9", "num_layers", "LAYOUT=9"),
    "whole number is text": ("--num_heads=four", "NUM_HEADS", "whole number", "four"),
    "whole number is a fraction": ("--iterations=1.5", "ITERATIONS", "whole number", "1.5"),
    "whole number is empty": ("--iterations=", "ITERATIONS", "whole number"),
    "number is text": ("--matrix_lr=fast", "MATRIX_LR", "expected a number", "fast"),
    "number is nan": ("--matrix_lr=nan", "MATRIX_LR", "expected a number", "nan"),
    "number is infinite": ("--max_train_flops=inf", "MAX_TRAIN_FLOPS", "expected a number", "inf"),
    "switch is text": ("--compile=maybe", "COMPILE", "0 or 1", "maybe"),
    "text of two lines": ("--num_heads=4\n8", "NUM_HEADS", "whole number"),
    "choice skips": ("--skips=unet", "SKIPS", "per_loop, unrolled, official, none", "unet"),
    "choice mode": ("--mode=test", "MODE", "train, eval, sample", "test"),
    "choice gate": ("--loop_gate=on", "LOOP_GATE", "x0, gain, none"),
    "choice codec": ("--codec=zip", "CODEC", "ans, lzma", "zip"),
    "flag of an earlier version": ("--embed_bits=16", "embed_bits", "QUANT_BITS=embed:16"),
    "choice quantizer": ("--quantizer=kmeans", "QUANTIZER", "absmax, sigma, gptq, fisher", "kmeans"),
    "choice noise": ("--quant_noise=gauss", "QUANT_NOISE", "none, uniform, round", "gauss"),
    "noise after the end": ("--quant_noise=round --quant_noise_from=1.5", "QUANT_NOISE_FROM", "0 to 1", "found 1.5"),
    "sigma without its quantizer": ("--quant_sigma=9", "QUANT_SIGMA", "QUANTIZER=absmax", "found 9", "QUANTIZER=sigma"),
    "target without its quantizer": ("--target_bytes=900000", "TARGET_BYTES", "QUANTIZER=absmax", "QUANTIZER=sigma"),
    "target and sigma": (
        "--quantizer=gptq --quant_sigma=9 --target_bytes=900000",
        "TARGET_BYTES",
        "no QUANT_SIGMA",
        "found 9",
    ),
    "target and loss": ("--quantizer=fisher --quant_loss=0.02 --target_bytes=900000", "TARGET_BYTES", "found 0.02"),
    "sigma with fisher": ("--quantizer=fisher --quant_sigma=9", "QUANT_SIGMA", "=fisher", "found 9", "QUANT_LOSS"),
    "loss without fisher": ("--quantizer=gptq --quant_loss=0.02", "QUANT_LOSS", "QUANTIZER=gptq", "found 0.02"),
    "noise with fisher": ("--quantizer=fisher --quant_noise=round", "QUANT_NOISE", "expected none", "found round"),
    "fisher's calibration below one sequence": ("--quantizer=fisher --calib_tokens=8", "CALIB_TOKENS", "found 8"),
    "fisher's calibration longer than the run": ("--quantizer=fisher --max_wallclock_seconds=20", "CALIB_SECONDS"),
    "target above the cap": (
        "--quantizer=sigma --target_bytes=20000000",
        "TARGET_BYTES",
        "BYTES_CAP=16000000",
        "found 20000000",
    ),
    "target that cannot be met": (
        "--quantizer=sigma --target_bytes=90000",
        "TARGET_BYTES",
        "within 90000 bytes",
        "found [0-9]+ \\+ about [0-9]+",
        "lower MODEL_DIM",
    ),
    "calibration below one sequence": ("--quantizer=gptq --calib_tokens=8", "CALIB_TOKENS", "=32", "found 8"),
    "calibration longer than the run": (
        "--quantizer=gptq --max_wallclock_seconds=20",
        "CALIB_SECONDS",
        "less than MAX_WALLCLOCK_SECONDS=20",
        "found 20",
    ),
    **{
        f"bits {rules or 'empty'}": (
            f"--quant_bits={rules}",
            "QUANT_BITS",
            "group:bits",
            "3 to 8 or 16",
            re.escape(rules),
        )
        for rules in (
            "",
            "6",
            "*",
            "*:2",
            "*:9",
            "*:x",
            "embed:8",
            "*:6,embed:8",
            "heads:8,*:6",
            "embed=8,*:6",
            "a:b:c,*:6",
        )
    },
    "choice dtype": ("--dtype=float16", "DTYPE", "bfloat16, float32", "float16"),
    "choice device": ("--device=tpu", "DEVICE", "cpu", "tpu"),
    "choice preset": ("--preset=smok", "PRESET", "smoke, .*pr319", '"smok"', "did you mean smoke\\?"),
    "width 0": ("--model_dim=0", "MODEL_DIM", "expected", "found 0"),
    "width of a billion": ("--model_dim=1000000000", "MODEL_DIM|BYTES_CAP", "expected", "found"),
    "sequence of a trillion": (
        "--train_seq_len=1000000000000 --train_batch_tokens=1000000000000",
        "TRAIN_SEQ_LEN",
        "found",
    ),
    "heads 0": ("--num_heads=0", "NUM_HEADS", "expected", "found 0"),
    "heads do not divide": ("--num_heads=3", "NUM_HEADS", "MODEL_DIM=32", "found 3", "try [24]"),
    "heads of odd width": ("--num_heads=32", "NUM_HEADS", "even width", "found 32", "try 16"),
    "kv heads do not divide": ("--num_kv_heads=3", "NUM_KV_HEADS", "divisor of NUM_HEADS=2", "found 3"),
    "mlp 0": ("--mlp_mult=0", "MLP_MULT", "expected", "found 0"),
    "batch no multiple of the sequence": ("--train_batch_tokens=100", "TRAIN_BATCH_TOKENS", "=32", "found 100", "96"),
    "batch below one sequence": ("--train_batch_tokens=16", "TRAIN_BATCH_TOKENS", "=32", "found 16", "try 32"),
    "batch 0": ("--train_batch_tokens=0", "TRAIN_BATCH_TOKENS", "found 0"),
    "sequence 0": ("--train_seq_len=0", "TRAIN_SEQ_LEN", "found 0"),
    "sequence longer than the batch": ("--train_seq_len=512", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN=512", "found 256"),
    "stride no divisor": ("--eval_stride=7", "EVAL_STRIDE", "divisor of TRAIN_SEQ_LEN=32", "found 7"),
    "stride longer than the sequence": ("--eval_stride=64", "EVAL_STRIDE", "found 64"),
    "microbatch below one sequence": ("--microbatch_tokens=8", "MICROBATCH_TOKENS", "=32", "found 8"),
    "validation cap below one sequence": ("--val_max_tokens=8", "VAL_MAX_TOKENS", "=32", "found 8"),
    "vocabulary beyond 16 bits": ("--vocab_size=70000", "VOCAB_SIZE", "65536", "found 70000"),
    "softcap beyond exp": ("--logit_softcap=100", "LOGIT_SOFTCAP", "60", "found 100"),
    "fraction above 1": ("--warmdown_frac=2", "WARMDOWN_FRAC", "0 to 1", "found 2"),
    "negative rate": ("--matrix_lr=-1", "MATRIX_LR", "expected", "found -1"),
    "beta1 of 1": ("--beta1=1", "BETA1", "expected", "found 1"),
    "beta2 of 1": ("--beta2=1", "BETA2", "expected", "found 1"),
    "seed beyond 32 bits": ("--seed=4294967296", "SEED", "expected", "found 4294967296"),
    "cap that cannot be kept": ("--bytes_cap=20000", "BYTES_CAP", "expected", "found", "lower MODEL_DIM"),
    "no budget": (
        "--iterations=0",
        "ITERATIONS",
        "MAX_WALLCLOCK_SECONDS",
        "MAX_TRAIN_FLOPS",
        "expected one",
        "set one",
    ),
    "lora without passes": ("--layout=4 --loop_schedule= --lora_rank=2", "LORA_RANK", "LAYOUT", "pass", "found"),
    "more passes than trained, unrolled": (
        "--skips=unrolled --eval_loops=3",
        "EVAL_LOOPS",
        "at most 2",
        "found 3",
        "per_loop",
    ),
    "more passes than trained, official": ("--skips=official --eval_loops=3", "EVAL_LOOPS", "at most 2", "found 3"),
    "layout word": ("--layout=deep", "LAYOUT", "3\\+3x3\\+5", '"deep"'),
    "layout empty": ("--layout=", "LAYOUT", "3\\+3x3\\+5"),
    "layout without passes": ("--layout=3+3x", "LAYOUT", "3\\+3x3\\+5", "3\\+3x"),
    "layout without core": ("--layout=x3", "LAYOUT", "3\\+3x3\\+5", "x3"),
    "layout without x": ("--layout=3+3+3", "LAYOUT", "3\\+3x3\\+5", "3\\+3\\+3"),
    "layout too long": ("--layout=1+2x2+1+1", "LAYOUT", "1\\+2x2\\+1\\+1"),
    "layout core 0": ("--layout=0x3", "LAYOUT", "at least one core block", "0x3"),
    "layout passes 0": ("--layout=3x0", "LAYOUT", "one pass", "3x0"),
    "layout of a billion blocks": ("--layout=1000000000x2", "LAYOUT", "expected", "1000000000"),
    "layout of a billion passes": ("--layout=2x1000000000 --loop_schedule=", "LAYOUT", "expected", "1000000000"),
    "schedule word": ("--loop_schedule=late", "LOOP_SCHEDULE", "0:1,0.35:3", "late"),
    "schedule of three parts": ("--loop_schedule=0:1,0.5:2:3", "LOOP_SCHEDULE", "0:1,0.35:3"),
    "schedule starts late": ("--loop_schedule=0.1:1,0.5:2", "LOOP_SCHEDULE", "start at 0", "0.1:1", '"0:1"'),
    "schedule time falls": ("--layout=2x3 --loop_schedule=0:1,0.5:2,0.4:3", "LOOP_SCHEDULE", "increase", "0.4:3"),
    "schedule passes fall": ("--loop_schedule=0:2,0.5:1", "LOOP_SCHEDULE", "increase", "0:2,0.5:1"),
    "schedule passes stay": ("--loop_schedule=0:2,0.5:2", "LOOP_SCHEDULE", "increase"),
    "schedule from 0 passes": ("--loop_schedule=0:0,0.5:2", "LOOP_SCHEDULE", "at least one pass"),
    "schedule after the end": ("--loop_schedule=0:1,1.5:2", "LOOP_SCHEDULE", "below 1", "1.5"),
    "schedule nan": ("--loop_schedule=0:1,nan:2", "LOOP_SCHEDULE", "expected", "nan"),
    "schedule never reaches R": ("--loop_schedule=0:1", "LOOP_SCHEDULE", "never reaches", "2 passes", '":2"'),
    "schedule exceeds R": ("--loop_schedule=0:1,0.5:3", "LOOP_SCHEDULE", "exceeds", "2 passes", '":2"'),
    "eval of nothing": ("--mode=eval", "ARTIFACT=<file>", "CHECKPOINT=<file>", "found neither"),
    "eval of two": ("--mode=eval --artifact=a --checkpoint=b", "ARTIFACT=<file>", "found both"),
    "eval of a missing file": (
        "--mode=eval --artifact=none.rgpt",
        "none.rgpt",
        "expected an artifact",
        "found no file",
    ),
    "sample of a missing file": ("--mode=sample --checkpoint=none", "none", "checkpoint", "found no file"),
    "training with an artifact": ("--artifact=a.rgpt", "ARTIFACT", "MODE=eval", "INIT_FROM"),
    "init from a missing file": ("--init_from=none.safetensors", "none.safetensors", "expected", "found no file"),
    "resume without name": ("--resume", "RESUME", "RUN_ID"),
    "resume with init": ("--resume --run_id=a --init_from=b", "RESUME", "INIT_FROM", "expected", "found"),
    "resume of nothing": ("--resume --run_id=a", "a.checkpoint.safetensors", "expected a checkpoint", "found none"),
    "name that is a path": ("--run_id=a/b", "RUN_ID", "expected letters", "a/b"),
    "name above the folder": ("--run_id=..", "RUN_ID", "expected letters"),
    "data missing": (
        "--data_path=nowhere",
        "nowhere",
        "expected fineweb_train|expected fineweb_val",
        "DATA_PATH",
        "data/offline.py",
    ),
    "tokenizer missing": (
        "--tokenizer_path=none.model",
        "none.model",
        "SentencePiece",
        "found no file",
        "TOKENIZER_PATH",
    ),
}


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """An empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting(script, case, tiny, tmp_path, quiet):
    flags, *patterns = BAD_SETTINGS[case]
    flags = flags.split(" ") if "\n" not in flags else [flags]
    before = tree(tmp_path)
    with within(30):
        outcome = run_in_process(script, *flags, **tiny)
    assert_refused(outcome, *patterns)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("NUM_HEADS", "four", "whole number"),
        ("COMPILE", "", "0 or 1"),
        ("MATRIX_LR", "0,04", "expected a number"),
        ("LAYOUT", "3x", "P\\+CxR\\+D"),
        ("SEED", "-1", "found -1"),
    ],
)
def test_bad_environment_names_the_variable(script, name, text, pattern, tiny, tmp_path, quiet):
    before = tree(tmp_path)
    assert_refused(run_in_process(script, **tiny | {name: text}), f"{name}\\b", pattern, re.escape(text))
    assert tree(tmp_path) == before


def test_bad_tokenizers(script, tiny, data, tmp_path, quiet):
    foreign, empty = quiet / "foreign.model", quiet / "empty.model"
    foreign.write_bytes(b"This is no tokenizer.\n" * 50)
    empty.write_bytes(b"")
    before = tree(tmp_path)
    for path in (foreign, empty, quiet):
        assert_refused(
            run_in_process(script, f"--tokenizer_path={path}", **tiny), re.escape(str(path)), "expected", "found"
        )
    outcome = run_in_process(script, "--vocab_size=512", **tiny)  # the tokenizer of another vocabulary
    assert_refused(outcome, re.escape(str(data.tokenizer)), "VOCAB_SIZE=512", "found 320", "set VOCAB_SIZE=320")
    assert tree(tmp_path) == before


def test_log_folder_cannot_be_written(script, tiny, tmp_path, quiet, monkeypatch):
    (quiet / "file").write_text("in the way")
    before = tree(tmp_path)
    for folder in ("file", "file/below"):
        outcome = run_in_process(script, f"--log_dir={quiet / folder}", "--run_id=a", **tiny)
        assert_refused(outcome, "LOG_DIR", "file", "set LOG_DIR")
        assert tree(tmp_path) == before
    # A full disk: found before the first step, and the folder of the run does not stay behind.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(run_in_process(script, "--run_id=a", **tiny), "LOG_DIR", "expected [0-9]+ bytes free", "found 1000")
    assert not (tmp_path / "logs" / "a").exists()


def test_run_id_in_use(script, tiny, tmp_path, quiet):
    folder = tmp_path / "logs" / "mine"
    folder.mkdir(parents=True)
    (folder / "train.log").write_text("an earlier run\n")
    before = tree(tmp_path)
    outcome = run_in_process(script, "--run_id=mine", **tiny)
    assert_refused(outcome, "RUN_ID", "mine", "another")
    assert "RESUME" not in outcome.err  # there is nothing to go on from
    assert tree(tmp_path) == before
    (folder / "checkpoint.safetensors").write_bytes(b"")
    assert_refused(run_in_process(script, "--run_id=mine", **tiny), "RUN_ID", "mine", "another", "RESUME=1")


def test_codec_missing(script, tiny, tmp_path, quiet, monkeypatch):
    """Asked for, it is refused before the first step; not asked for, lzma takes its place and the log says so."""
    found = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name, *rest: None if name == "constriction" else found(name, *rest)
    )
    before = tree(tmp_path)
    for how in ({"CODEC": "ans"}, {}):
        flags = () if how else ("--codec=ans",)
        outcome = run_in_process(script, *flags, **tiny | how)
        assert_refused(outcome, "CODEC=ans", "constriction", "pip install constriction", "CODEC=lzma")
        assert tree(tmp_path) == before
    outcome = run_in_process(script, "--run_id=a", **tiny)
    assert outcome.code == 0 and "notice: constriction is not installed, so CODEC=lzma" in outcome.out, outcome
    result = json.loads((tmp_path / "logs/a/result.json").read_text())
    assert result["codec"] == "lzma" and result["val_bpb"] > 0
    outcome = run_in_process(script, "--run_id=b", "--codec=lzma", **tiny)
    assert outcome.code == 0 and "notice: constriction" not in outcome.out


def test_smoke_data_cannot_be_made(script, tiny, tmp_path, quiet):
    """The one preset that writes data: a vocabulary below the byte pieces, a folder that cannot be."""
    (quiet / "file").write_text("in the way")
    paths = {"DATA_PATH": quiet / "new" / "d", "TOKENIZER_PATH": quiet / "new" / "t.model", "PRESET": "smoke"}
    outcome = run_in_process(script, "--vocab_size=100", **tiny | paths)
    assert_refused(outcome, "VOCAB_SIZE", "100")
    assert not list(quiet.rglob("*.bin")) and not [
        p for p in quiet.rglob("*") if "model" in p.name or "vocab" in p.name
    ]
    outcome = run_in_process(script, **tiny | paths | {"DATA_PATH": quiet / "file" / "d"})
    assert_refused(outcome, re.escape(str(quiet / "file")))


def test_real_processes_exit_with_one_line(script, tiny, tmp_path):
    """What the other tests see in this process holds for a real one, too."""
    for flag, pattern in (("--num_head=4", "--num_heads"), ("--data_path=nowhere", "nowhere")):
        assert_refused(run_cli(script, flag, **tiny), pattern)
    assert not (tmp_path / "logs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Precedence, notices, help
# ---------------------------------------------------------------------------------------------------------------------


def test_precedence(script):
    def value(argv, environ, field="model_dim"):
        return getattr(script.load_config(argv, environ, "baseline")[0], field)

    assert value([], {}) == 512  # the default
    assert value([], {}, "layout") == "9"  # the preset over the default
    assert value([], {"PRESET": "pr319"}) == 640
    assert value(["--preset=laptop"], {"PRESET": "pr319"}) == 384  # flag over environment
    assert value([], {"PRESET": "pr319", "MODEL_DIM": "320"}) == 320  # environment over preset
    assert value(["--model_dim=256"], {"PRESET": "pr319", "MODEL_DIM": "320"}) == 256  # flag over all
    assert value(["--model-dim=256"], {}) == 256  # dashes serve as underscores
    assert value(["--model_dim=256", "--model_dim=128"], {}) == 128  # the last flag
    assert value(["--resume", "--run_id=a"], {}, "resume") is True  # a bare switch is on
    assert value([], {"COMPILE": "0"}, "compile") is False
    assert value([], {"PROMPT": "a=b\nc"}, "prompt") == "a=b\nc"
    assert value([], {"model_dim": "320"}) == 512  # only upper-case variables are settings


def test_every_preset_is_valid(script):
    for preset in script.PRESETS:
        config, notices = script.load_config([f"--preset={preset}"], {}, "smoke")
        assert config.preset == preset and not notices
        assert set(script.PRESETS[preset]) <= {field.name for field in dataclasses.fields(script.Config)}
    assert script.DEFAULT_PRESET in script.PRESETS


def test_notices(script):
    def notices(**environ):
        return script.load_config([], environ, "baseline")[1]

    for name, near in (("NUM_HEAD", "NUM_HEADS"), ("MATRIX_LRS", "MATRIX_LR"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN")):
        (notice,) = notices(**{name: "1"})
        assert name in notice and near in notice and "\n" not in notice
    for name, instead in (("NUM_LAYERS", "LAYOUT"), ("NUM_LOOPS", "LAYOUT"), ("WARMDOWN_ITERS", "WARMDOWN_FRAC")):
        (notice,) = notices(**{name: "3"})
        assert f"{name}=3" in notice and f"{instead}=" in notice and "\n" not in notice
    others = """PATH HOME LANG SHELL TERM USER PWD HOSTNAME LOGNAME EDITOR PAGER MASTER_ADDR MASTER_PORT RANK WORLD_SIZE
        LOCAL_RANK GROUP_RANK ROLE_RANK LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE ROLE_NAME OMP_NUM_THREADS
        TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE MLX_RANK
        MLX_HOSTFILE CUDA_VISIBLE_DEVICES PYTHONPATH VIRTUAL_ENV GITHUB_RUN_ID SSH_TTY XDG_RUNTIME_DIR""".split()
    assert notices(**dict.fromkeys(others, "1")) == []  # nobody is bothered about what torchrun or a shell sets


def test_notices_reach_the_log(script, tiny, tmp_path):
    outcome = run_in_process(script, "--run_id=a", "--iterations=1", NUM_HEAD="4", WARMDOWN_ITERS="1200", **tiny)
    assert outcome.code == 0, outcome
    log = (tmp_path / "logs" / "a" / "train.log").read_text()
    for text in (outcome.out, log):
        assert re.search(r"^notice: NUM_HEAD .*NUM_HEADS", text, re.M)
        assert re.search(r"^notice: WARMDOWN_ITERS=1200 .*WARMDOWN_FRAC", text, re.M)


def test_help_names_every_setting(script):
    outcome = run_in_process(script, "--help", "--mistyped=1")
    assert outcome.code == 0 and outcome.err == ""
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"^\s+{field.name}: \w+ = .+#.+", outcome.out, re.M), f"{field.name} has no comment in --help"
    for name in ("torchrun", "python"):
        assert name in outcome.out or script.FRAMEWORK == "mlx"


def test_settings_that_decide_what_is_trained_are_hashed(script):
    base = script.load_config([], TINY, "smoke")[0]
    different = {"matrix_lr": 0.1, "layout": "4", "loop_schedule": "0:2", "iterations": 9, "train_batch_tokens": 512}
    for field, value in different.items():
        assert script.config_sha256(dataclasses.replace(base, **{field: value})) != script.config_sha256(base), field
    for field, value in {"seed": 1, "preset": "laptop", "run_id": "x", "device": "", "checkpoint_every": 3}.items():
        assert script.config_sha256(dataclasses.replace(base, **{field: value})) == script.config_sha256(base), field
