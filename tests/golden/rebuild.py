"""The weights and token ids behind controls.npz, from fixed seeds; NumPy only (see README.md in this folder)."""

import numpy as np

VOCAB, SEQ, BATCH, STEPS = 64, 32, 2, 3


def golden_weights(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Return the float32 starting weights for a model whose parameters have these names and shapes.

    One generator serves all tensors in the order of their sorted names, so `shapes` must hold every
    parameter of the model: one missing or extra name changes all tensors that sort after it.
    """
    rs = np.random.RandomState(1234)
    weights = {}
    for name in sorted(shapes):
        w = rs.standard_normal(shapes[name])
        leaf = name.rsplit(".", 1)[-1]
        if name == "tok_emb.weight":
            w = 0.5 * w
        elif leaf == "weight":
            w = w / np.sqrt(w.shape[1])  # stored as [out, in]
        elif leaf == "q_gain":
            w = 1.5 + 0.1 * w
        elif leaf in ("attn_scale", "mlp_scale", "skip_weights"):
            w = 1.0 + 0.1 * w
        elif leaf == "resid_mix":
            w = np.array([[1.0], [0.0]]) + 0.1 * w
        elif leaf == "loop_embed":
            w = 0.1 * w
        elif leaf == "loop_gate":
            w = 1.0 / 3.0 + 0.05 * w
        else:
            raise KeyError(f"no golden rule for parameter {name!r}")
        weights[name] = w.astype(np.float32)
    return weights


def golden_ids() -> np.ndarray:
    """Return the ids [step, sequence, SEQ + 1]: step s reads [s, :, :-1] and predicts [s, :, 1:]."""
    return np.random.RandomState(77).randint(0, VOCAB, size=(STEPS, BATCH, SEQ + 1))


def golden_numbers(path, case: str) -> dict[str, np.ndarray]:
    """Read one case ("baseline" or "pr319") of controls.npz with the case prefix removed from the keys.

    The norms lie in the file as one vector per case, in the order of the sorted parameter names; here they
    become one entry per parameter: `grad_norm/<name>` and `weights3_norm/<name>`, beside `grad/<name>` etc.
    """
    with np.load(path, allow_pickle=False) as f:
        out = {k.split("/", 1)[1]: f[k] for k in f.files if k.startswith(case + "/")}
    names = sorted(k.split("/", 1)[1] for k in out if k.startswith("grad/"))
    for key in ("grad_norm", "weights3_norm"):
        for name, value in zip(names, out.pop(key), strict=True):
            out[f"{key}/{name}"] = value
    return out
