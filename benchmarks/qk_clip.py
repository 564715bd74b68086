"""What QK-Clip costs: a Llama's forward and backward pass with the largest logits and without, in turns.

python benchmarks/qk_clip.py [--device cuda] [--tokens 1024] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import time

import torch
from device import finish, machine, on, result, shown
from transformers import LlamaConfig, LlamaForCausalLM

import muon_plugin

ROUNDS = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    args = parser.parse_args()
    on(args.device)
    rows = [
        "| tokens | forward | with the largest logits | share of the forward pass | of forward and backward |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for tokens in args.tokens:
        without, clipped = measure(args, tokens)
        added = clipped[0] - without[0]
        forward, both = added / without[0], added / without[1]
        rows.append(f"| {tokens:,} | {shown(without[0])} | {shown(clipped[0])} | {forward:.0%} | {both:.0%} |")
    size = f"a Llama of {args.layers} layers, hidden {args.hidden}, 8 heads, {args.dtype}, sdpa"
    text = "\n".join([*rows, "", f"{machine()}; {size}; one sequence; the shortest of {ROUNDS} rounds in turns."])
    print(text)
    result("qk_clip").write_text(text + "\n")


def measure(args: argparse.Namespace, tokens: int) -> list[list[float]]:
    """Seconds of a forward pass, and of forward and backward: without and with QK-Clip."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": args.layers, "num_attention_heads": 8, "vocab_size": 4096}
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",
        **sizes,
    )
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = LlamaForCausalLM(config).to(args.device, dtype).train()
    batch = torch.randint(0, 4096, (1, tokens), device=args.device)
    seconds: list[list[list[float]]] = [[], []]
    for number in range(ROUNDS + 1):
        for clips in (False, True):
            setting = {"threshold": 100} if clips else None
            if clips:
                muon_plugin.Muon(model.named_parameters(), model=model, qk_clip=setting)
            finish()
            began = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            finish()
            forward = time.perf_counter()
            loss.backward()
            finish()
            if number:  # the first warms up
                seconds[clips].append([forward - began, time.perf_counter() - began])
            model.zero_grad()
            muon_plugin.unregister()
    return [[min(column) for column in zip(*each)] for each in seconds]


if __name__ == "__main__":
    main()
