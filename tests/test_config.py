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
    "choice skips": ("--skips=unet", "SKIPS", "per_loop, official, none", "unet"),
    "choice mode": ("--mode=test", "MODE", "train, preflight, eval, sample, export", "test"),
    "choice gate": ("--loop_gate=on", "LOOP_GATE", "x0, gain, none"),
    "skips of an earlier version": ("--skips=unrolled", "SKIPS", "per_loop, official, none", "unrolled"),
    "flag of an earlier version": ("--embed_float16=1", "embed_float16", "unknown flag"),
    "setting of an earlier version": ("--codec=ans", "codec", "unknown flag", "--help|did you mean"),
    "choice quantizer": ("--quantizer=kmeans", "QUANTIZER", "absmax, trellis", "kmeans"),
    "quantizer of an earlier version": ("--quantizer=fisher", "QUANTIZER", "absmax, trellis", "fisher"),
    "choice of what counts": ("--count_code=2", "COUNT_CODE", "1, packed, 0", '"2"'),
    "target without its quantizer": ("--target_bytes=900000", "TARGET_BYTES", "QUANTIZER=absmax", "QUANTIZER=trellis"),
    "loss without its quantizer": ("--quant_loss=0.02", "QUANT_LOSS", "QUANTIZER=absmax", "0.02", "QUANTIZER=trellis"),
    "target and loss": ("--quantizer=trellis --quant_loss=0.02 --target_bytes=900000", "TARGET_BYTES", "found 0.02"),
    "target above the cap": (
        "--quantizer=trellis --target_bytes=20000000",
        "TARGET_BYTES",
        "BYTES_CAP=16000000",
        "found 20000000",
    ),
    "target that cannot be met": (
        "--quantizer=trellis --target_bytes=90000",
        "TARGET_BYTES",
        "within 90000 bytes",
        "found [0-9]+ \\+ at least [0-9]+",
        "lower MODEL_DIM",
    ),
    "target of the weights that cannot be met": (
        "--quantizer=trellis --target_bytes=2000 --count_code=0",
        "TARGET_BYTES",
        "within 2000 bytes",
        "found 0 \\+ at least [0-9]+",
    ),
    "calibration below one sequence": ("--quantizer=trellis --calib_tokens=8", "CALIB_TOKENS", "=32", "found 8"),
    "calibration longer than the run": (
        "--quantizer=trellis --max_wallclock_seconds=20",
        "CALIB_SECONDS",
        "less than MAX_WALLCLOCK_SECONDS=20",
        "found 20",
    ),
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
    "a head turned whole under another name": (
        "--rotary_dims=16",
        "ROTARY_DIMS",
        "below the 16 .*0 for all",
        "found 16",
    ),
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
    "fraction above 1": ("--warmdown_frac=2", "WARMDOWN_FRAC", "at most 1", "found 2"),
    "number beyond all numbers": ("--seed=" + "9" * 400, "SEED", "a whole number", "999"),
    "momentum above 1": ("--muon_momentum=1.5", "MUON_MOMENTUM", "at most 1", "found 1.5"),
    "negative warm-up": ("--lr_warmup_steps=-1", "LR_WARMUP_STEPS", "0 or more", "found -1"),
    "shuffle is text": ("--shuffle=seed", "SHUFFLE", "0 or 1", "seed"),
    "negative rate": ("--matrix_lr=-1", "MATRIX_LR", "expected", "found -1"),
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
    "rows without passes": ("--layout=4 --loop_schedule= --pass_vectors", "PASS_VECTORS", "LAYOUT", "pass", "found"),
    "more passes than one": ("--layout=4 --loop_schedule= --eval_loops=3", "EVAL_LOOPS", "LAYOUT=4", "found 3"),
    "resume of a file": ("--mode=export --checkpoint=a --run_id=b --resume=1", "RESUME=1", "MODE=train", "MODE=export"),
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
    "export of an artifact": ("--mode=export --artifact=a.rgpt", "MODE=export", "CHECKPOINT=<file>", "rounded already"),
    "sample of a missing file": ("--mode=sample --checkpoint=none", "none", "checkpoint", "found no file"),
    "training with an artifact": ("--artifact=a.rgpt", "ARTIFACT", "MODE=eval", "INIT_FROM"),
    "init from a missing file": ("--init_from=none.safetensors", "none.safetensors", "expected", "found no file"),
    "resume without name": ("--resume", "RESUME", "RUN_ID"),
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


@pytest.mark.parametrize("there", ["fineweb_train_000000.bin", "fineweb_val_000003.bin"])
def test_smoke_never_replaces_a_dataset_or_a_tokenizer(any_script, data, there, tmp_path):
    folder, tokenizer = tmp_path / "d", tmp_path / "t.model"
    c = any_script.Config(vocab_size=320, data_path=str(folder), tokenizer_path=str(tokenizer))
    folder.mkdir()
    (folder / there).write_bytes(b"somebody's")
    any_script.make_smoke_data(c)
    assert {path.name for path in tmp_path.rglob("*")} == {"d", there}
    (folder / there).unlink()
    tokenizer.write_bytes(data.tokenizer.read_bytes())
    before = tokenizer.stat().st_mtime_ns
    any_script.make_smoke_data(c)
    assert tokenizer.stat().st_mtime_ns == before and len(list(folder.iterdir())) == 2


def test_smoke_data_cannot_be_made(any_script, tiny, tmp_path, quiet, monkeypatch):
    """The one preset that writes data: a vocabulary below the byte pieces, a folder in the way, names of others."""
    monkeypatch.chdir(quiet)
    env = {name: value for name, value in tiny.items() if name not in ("DATA_PATH", "TOKENIZER_PATH")}
    env |= {"PRESET": "smoke", "VOCAB_SIZE": "100"}
    assert_refused(run_in_process(any_script, **env), "VOCAB_SIZE", "100")
    assert_refused(run_in_process(any_script, **env | {"DATA_PATH": "fineweb10B_sp1024"}), "fineweb10B_sp1024")
    written = [path for path in quiet.rglob("*") if path.suffix in (".bin", ".model", ".vocab")]
    assert not written
    (quiet / "data").write_text("in the way")
    assert_refused(run_in_process(any_script, **env | {"VOCAB_SIZE": "512"}), "data/tokenizers|data/datasets")


def test_real_processes_exit_with_one_line(script, tiny, tmp_path):
    """What the other tests see in this process holds for a real one, too."""
    assert_refused(run_cli(script, "--data_path=nowhere", **tiny), "nowhere")
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
    assert script.DEFAULT_PRESET in script.PRESETS


def test_what_uses_a_file_has_no_preset_unless_it_is_named(script):
    """MODE=export would otherwise fill the 16,000,000 bytes of the default preset, or refuse QUANT_LOSS beside them."""
    flags = ["--mode=export", "--checkpoint=a.safetensors", "--quantizer=trellis", "--quant_loss=0.01"]
    c = script.load_config(flags, {}, "record")[0]
    assert c.preset == "" and c.target_bytes == 0 and c.count_code == "1"
    with pytest.raises(script.InputError, match="TARGET_BYTES: .*QUANT_LOSS"):
        script.load_config([*flags, "--preset=record"], {}, "record")
    assert script.load_config(["--mode=eval", "--artifact=a", "--preset=demo"], {}, "record")[0].train_seq_len == 256


def test_presets_shuffle_and_warm_up_but_for_the_controls(any_script):
    presets = {name: any_script.load_config([f"--preset={name}"], {}, "smoke")[0] for name in any_script.PRESETS}
    assert all(c.shuffle for c in presets.values())
    assert {name for name, c in presets.items() if not c.lr_warmup_steps} == {"baseline", "pr319"}
    switching = {name for name, c in presets.items() if "," in c.loop_schedule}
    assert {"smoke", "demo", "laptop", "record"} <= switching
    gates = {name: (presets[name].loop_gate, presets[name].loop_gate_init) for name in switching}
    assert gates.pop("record") == ("gain", 1.0)  # as published: at full strength
    assert set(gates.values()) == {("gain", 0.0)}


def test_constants_that_were_settings_keep_their_values(both):
    for module in both:
        assert (module.BETA1, module.BETA2, module.ADAM_EPS) == (0.9, 0.95, 1e-8)
        assert (module.ROPE_BASE, module.LOGIT_SOFTCAP, module.EMBED_INIT_STD) == (10000.0, 30.0, 0.005)
        assert (module.NEWTON_SCHULZ_STEPS, module.TOP_K) == (5, 50)


def test_every_setting_is_in_one_group(script):
    names = [field.name for field in dataclasses.fields(script.Config)]
    assert " ".join(script.GROUPS.values()).split() == names and len(set(names)) == len(names)
    assert list(script.GROUPS) == "run data model training score artifact log machine sample".split()
    members = dict(data="vocab_size", training="loop_gate_lr", score="eval_stride", artifact="bytes_cap",
                   machine="dtype", model="init_from", run="tokenizer_path", log="checkpoint_every",
                   sample="temperature")  # fmt: skip
    assert all(name in script.GROUPS[group].split() for group, name in members.items())


def test_notices(script):
    def notices(**environ):
        return script.load_config([], environ, "baseline")[1]

    expected = "notice: from the environment: SEED=7 MODE=train COMPILE=False"
    assert notices(SEED="7", MODE="train", COMPILE="0", seed="8", mode="eval") == [expected]
    assert notices(PROMPT="a\nstep:1/9") == ["notice: from the environment: PROMPT=a\\nstep:1/9"]  # one line

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
    """What another program set in the environment is seen: names that nearly are settings, and those that are."""
    flags = [f"--{name}={value}" for name, value in tiny.items() if name != "SEED"]
    outcome = run_in_process(
        script, *flags, "--run_id=a", "--iterations=1", NUM_HEAD="4", WARMDOWN_ITERS="1200", SEED="7", PROMPT="a b"
    )
    assert outcome.code == 0, outcome
    log = (tmp_path / "logs" / "a" / "train.log").read_text()
    for text in (outcome.out, log):
        assert re.search(r"^notice: NUM_HEAD .*NUM_HEADS", text, re.M)
        assert re.search(r"^notice: WARMDOWN_ITERS=1200 .*WARMDOWN_FRAC", text, re.M)
        assert re.search(r"^notice: from the environment: SEED=7 PROMPT=a b$", text, re.M)
    head = log[log.index("\n" + "=" * 120 + "\n") :]
    c = script.Config(**json.loads(re.search(r"^config: (.*)$", head, re.M).group(1)))
    assert c.seed == 7 and c.run_id == "a"
    assert log.startswith(script.script_source()) and f"sha256: {script.source_sha256()}" in head


def test_help_names_every_setting(script):
    outcome = run_in_process(script, "--help", "--mistyped=1")
    assert outcome.code == 0 and outcome.err == ""
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"^\s+{field.name}: \w+ = .+#.+", outcome.out, re.M), f"{field.name} has no comment in --help"
    for name in ("torchrun", "python"):
        assert name in outcome.out or script.FRAMEWORK == "mlx"


def other_values(script):
    """For every setting a value other than the tiny run's."""
    special = dict(dtype="bfloat16", count_code="packed", quantizer="trellis", layout="1+2x3+1", skips="none",
                   loop_gate="x0", mode="eval", preset="demo", device="gpu", loop_schedule="0:2")  # fmt: skip
    base = script.load_config([], TINY, "smoke")[0]
    for field in dataclasses.fields(script.Config):
        value = getattr(base, field.name)
        if field.name in special:
            yield base, field.name, special[field.name]
        elif field.type == "str":
            yield base, field.name, value + "x"
        else:
            yield base, field.name, (not value) if field.type == "bool" else value + 1


def test_settings_that_decide_what_is_trained_are_hashed(script):
    """And no others: an interrupted run goes on with another cadence, score or export."""
    trained = " ".join(script.GROUPS[group] for group in ("data", "model", "training")).split()
    assert len(trained) > 25
    for base, name, value in other_values(script):
        assert value != getattr(base, name)
        changed = dataclasses.replace(base, **{name: value})
        same = script.config_sha256(changed) == script.config_sha256(base)
        assert same == (name not in trained), name


def test_the_time_kept_for_the_calibration_is_hashed(any_script):
    """It is not trained in, where there is a clock; where there is none, it decides nothing."""
    base = any_script.load_config(["--quantizer=trellis"], TINY, "smoke")[0]
    timed = dataclasses.replace(base, max_wallclock_seconds=100.0)
    for c, differ in ((base, False), (timed, True)):
        hashes = {any_script.config_sha256(dataclasses.replace(c, calib_seconds=kept)) for kept in (10.0, 20.0)}
        hashes.add(any_script.config_sha256(dataclasses.replace(c, quantizer="absmax")))
        assert len(hashes) == (3 if differ else 1)
    assert any_script.seconds_to_train(timed) == 80.0
    shorter = dataclasses.replace(timed, quantizer="absmax", max_wallclock_seconds=80.0)
    assert any_script.config_sha256(shorter) == any_script.config_sha256(timed)  # what is trained is the same


def test_settings_of_the_score_are_measured_by_the_file(script, data, tmp_path):
    """And not by the defaults, whose sequences are longer than those of the file."""
    env = TINY | data.env | {"LOG_DIR": str(tmp_path), "ITERATIONS": "1"}
    assert run_in_process(script, "--run_id=a", **env).code == 0
    where = [f"--{name}={data.env[name.upper()]}" for name in ("data_path", "tokenizer_path")]
    flags = ["--mode=eval", "--compile=0", f"--checkpoint={tmp_path}/a/model.safetensors", *where]
    outcome = run_in_process(script, *flags, "--val_max_tokens=64", "--eval_stride=8", "--microbatch_tokens=32")
    assert outcome.code == 0 and "tokens:64" in outcome.out
    for more, said in (("--val_max_tokens=16", "at least TRAIN_SEQ_LEN=32"), ("--eval_stride=7", "a divisor of")):
        outcome = run_in_process(script, *flags, more)
        assert outcome.code == 1 and said in outcome.err and outcome.err.count("\n") == 1
