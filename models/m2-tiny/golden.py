"""Golden logits of the shipped files: what transformers and the training code compute from their dequantized weights.

    python models/m2-tiny/golden.py HF_DIR models/m2-tiny/m2-tiny.gguf [--out tests/golden/m2-tiny.npz]

HF_DIR is the exported checkpoint from which the files were converted. The weights of both files are read back with the
`gguf` package and put into a copy of the checkpoint; transformers gives the trunk's logits, the training code those of
the modules. Prints how far the quantized files are from the checkpoint itself. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import MiniMaxM2ForCausalLM

from export import load_exported
from m2lite.quant.checkpoint import open_checkpoint
from m2lite.quant.config import parse_config
from m2lite.quant.names import bind_tensors
from model import Packed
from tests.golden.compare import compare
from tokenizer import load_tokenizer, render_prompt

# The model's own reply to a held-out prompt. Logits are kept of every seventh position: enough, and small in git.
MESSAGES = [{"role": "user", "content": "Tell me a short story about a fox and a lantern."}]
REPLY = (
    "The user wants a story about a fox and a lantern. I will tell a short one.\n</think>\n\nOnce, a "
    "brave fox named Lena lived in the forest. Lena was afraid of the dark. Every night she hid "
    'under the blanket. One night she heard a small voice outside. "Help! I am lost!" It was a '
    'bird. Lena was very scared. But she held a lantern tight and went out into the night. "Where '
    'are you?" she called. Slowly she walked through the dark until she found the bird. "You came!" '
    'said the bird. "Were you not afraid?" "I was," said Lena, "but you needed me." They walked '
    "home together under the stars. After that night, the dark was not so bad any more.[e~["
)
EVERY = 7


def dequantized(hf_dir: Path, files: list[Path], out: Path) -> None:
    """A copy of the checkpoint, in float32, that holds the weights of the GGUF files."""
    shutil.copytree(hf_dir, out, ignore=shutil.ignore_patterns("model.safetensors"))
    state = {name: value.float() for name, value in load_file(hf_dir / "model.safetensors").items()}
    checkpoint = open_checkpoint(hf_dir)
    bound = bind_tensors(checkpoint, parse_config(checkpoint.config))
    sources = {b.name: b.pieces for b in (*bound.trunk, *(bound.mtp.bindings if bound.mtp else ()))}
    left = set(state)
    for file in files:
        for tensor in gguf.GGUFReader(file).tensors:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            pieces = sources[str(tensor.name)]
            matrices = values.reshape(len(pieces), -1)
            for piece, rows in zip(pieces, matrices, strict=True):
                state[piece.source] = rows.reshape(state[piece.source].shape).clone()
                left.discard(piece.source)
    assert not left, sorted(left)[:3]
    save_file(state, out / "model.safetensors")


@torch.no_grad()
def module_logits(folder: Path, ids: list[int]) -> list[np.ndarray]:
    """Logits of every prediction module, by the training code."""
    model = load_exported(folder)
    packed = Packed([np.array(ids)])
    embedded, g0 = model.trunk(packed)
    hidden = model.modules_hidden(embedded, g0, packed)
    return [model.logits(g, m.final_norm).numpy() for g, m in zip(hidden, model.mtp, strict=True)]


@torch.no_grad()
def trunk_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of the trunk, by transformers in float32."""
    with tempfile.TemporaryDirectory() as plain:  # transformers does not know the modules
        target = Path(plain)
        state = load_file(folder / "model.safetensors")
        save_file({k: v.float() for k, v in state.items() if ".mtp." not in k}, target / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config))
        model = MiniMaxM2ForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        return model(torch.tensor([ids])).logits[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/m2-tiny.npz"))
    args = parser.parse_args()
    ids = load_tokenizer(args.checkpoint).encode(render_prompt(MESSAGES) + REPLY, add_special_tokens=False).ids
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "hf"
        dequantized(args.checkpoint, [args.model, args.model.with_name(f"mtp-{args.model.name}")], copy)
        trunk, modules = trunk_logits(copy, ids), module_logits(copy, ids)
    print("trunk against the checkpoint:", compare(trunk_logits(args.checkpoint, ids), trunk))
    for k, (exact, found) in enumerate(zip(module_logits(args.checkpoint, ids), modules, strict=True), 1):
        print(f"module {k} against the checkpoint:", compare(exact, found))
    arrays = {f"mtp_{k}": logits[::EVERY] for k, logits in enumerate(modules, 1)}
    np.savez_compressed(args.out, tokens=np.array(ids, np.int32), every=EVERY, trunk=trunk[::EVERY], **arrays)


if __name__ == "__main__":
    main()
