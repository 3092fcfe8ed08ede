"""What methods cost while a vision-language model reads a prompt and answers: prefill and decode, apart.

    python benchmarks/speed/decoding.py --log                                   # LLaVA's layout / 8, on a CPU
    python benchmarks/speed/decoding.py --model world-llava --tokens 64 --log
    python benchmarks/speed/decoding.py --model llava-7b --device cuda --dtype bfloat16 --log
    python benchmarks/speed/decoding.py --model llava-7b --device cuda --dtype bfloat16 --static --log
    python benchmarks/speed/decoding.py --idle --log                            # attached, with nothing to do

Peers in the same run: plain ``generate`` on sdpa, and eager attention that returns all maps, which is what reference
implementations of these methods run on. Prefill is the time from the call to the first token, with everything that a
method does before it (VHR's pass without the image, GIFT's survey); decode is the time of all tokens behind it; attach
comes before both, once for many answers. Aims: decode at most 1.01 (VHR), 1.03 (PAI), 1.06 (VAR, GIFT) of plain,
prefill at most 1.05, peak memory at most 1.03; VAR at least 5 times as fast as eager with maps. Attached and idle: at
most 1.01 on a GPU, 1.02 on a CPU.

VAR needs attention sinks, which random weights do not have: its channels and tau are set so that some tokens count as
sinks and heads are redistributed; the notes of the log say how many. Its work does not depend on that number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import tellers
import torch
from measure import Parts, Ratio

import attnsteer
from attnsteer import Where
from attnsteer.processor import Processor
from attnsteer.processors import GIFT, PAI, VAR, VHR
from attnsteer.site import AttentionCall

DECODE = {"VHR": 1.01, "PAI": 1.03, "VAR": 1.06, "GIFT": 1.06}
PREFILL, MEMORY, FASTER = 1.05, 1.03, 5.0
IDLE = {"cuda": 1.01, "cpu": 1.02}
MAPS = "eager with maps"
SHARES = {"PAI": 30 / 32, "VAR": 29 / 32}
"""Shares of the layers that the papers steer in LLaVA-1.5-7B; the others find their relative depth by themselves."""
CHANNELS, TAU = tuple(range(8)), 2.75
"""Of VAR: with random weights about a twentieth of all tokens exceeds tau in one of these channels."""


# ---- the methods -----------------------------------------------------------------------------------------------------
def methods(teller: tellers.Teller) -> dict[str, Processor]:
    """The four with the papers' settings, on as large a share of the layers as in LLaVA-1.5-7B."""
    return {
        "VHR": VHR(),
        "PAI": PAI(_layers(teller, "PAI")),
        "VAR": VAR(_layers(teller, "VAR"), channels=CHANNELS, tau=TAU),
        "GIFT": GIFT(token_selector="all") if teller.processor is None else GIFT(),
    }


def _layers(teller: tellers.Teller, method: str) -> Where | None:
    total = teller.model.config.get_text_config(decoder=True).num_hidden_layers
    return None if total >= 28 else Where(layers=slice(total - round(SHARES[method] * total), None))


@dataclass(frozen=True)
class CountedVAR(VAR):
    """VAR that counts the heads it redistributes; looks at values, so it is never timed."""

    def react(self, call: AttentionCall) -> Any:
        edit = super().react(call)
        if edit is not None:
            moved = (edit.weight[:, :, -1] != 0).sum()
            heads, calls = call.shared.get("moved", (0, 0))
            call.shared["moved"] = (heads + int(moved), calls + moved.numel() * edit.weight.shape[1])
        return edit


def proof(teller: tellers.Teller, var: VAR) -> str:
    """How many sinks there are, and how many heads VAR redistributes in the rows that predict."""
    from attnsteer.processors.var import sink_report

    counted = CountedVAR(var.where, channels=var.channels, tau=var.tau)
    with attnsteer.attach(teller.model, counted, processor=teller.processor) as steering, torch.no_grad():
        generate(teller, 4)
        heads, calls = steering.plans[0].shared["moved"]
        found = sink_report(steering.states(steering.plans[0].processor))
    image, text = (sum(layer.counts[0][i] for layer in found) / len(found) for i in (0, 1))
    return (
        f"VAR with {len(CHANNELS)} channels and tau {TAU}: {image:.0f} sinks in the image and {text:.0f} in the text "
        f"on average of {len(found)} layers; {heads} of {calls} heads were redistributed in 4 predicting rows."
    )


# ---- one answer ------------------------------------------------------------------------------------------------------
class Watch:
    """Marks moments: on a GPU without waiting for it."""

    def __init__(self, device: str):
        self._device, self._marks = device, []  # type: tuple[str, list[Any]]

    def mark(self) -> None:
        if self._device == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(measure.now())

    def seconds(self) -> list[float]:
        """Between one mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device != "cuda":
            return [later - sooner for sooner, later in pairs]
        torch.cuda.synchronize()
        return [sooner.elapsed_time(later) / 1e3 for sooner, later in pairs]


def generate(
    teller: tellers.Teller,
    tokens: int,
    after_first: Callable[[], Any] = lambda: None,
    by: Callable[..., Any] | None = None,
    **more: Any,
) -> None:
    """Greedy tokens, as many as asked for; ``after_first`` is called once the first is there, and ``by`` generates in
    place of ``generate`` of the model with its inputs."""
    calls = 0

    def notice(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            after_first()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    by = by or partial(teller.model.generate, **teller.inputs)
    by(**length, do_sample=False, stopping_criteria=[notice], **more)


def answer(
    teller: tellers.Teller, tokens: int, device: str, processors: Sequence[Processor] = (), maps: bool = False
) -> Parts:
    """One answer, and the seconds of attaching, prefill and decode."""
    watch = Watch(device)
    if maps:
        teller.model.set_attn_implementation("eager")
    more: dict[str, Any] = {"output_attentions": True} if maps else {}
    if teller.settings.get("cache") == "static":
        more["cache_implementation"] = "static"
    try:
        watch.mark()
        attached = attnsteer.attach(teller.model, *processors, processor=teller.processor) if processors else None
        with attached or nullcontext():
            watch.mark()
            generate(teller, tokens, watch.mark, **more)
            watch.mark()
    finally:
        if maps:
            teller.model.set_attn_implementation("sdpa")
    attach, prefill, decode = watch.seconds()
    return Parts(prefill=prefill, decode=decode, **({"attach": attach} if processors else {}))


def answer_of_prefill(teller: tellers.Teller, tokens: int, device: str, method: Processor) -> Parts:
    """One answer by ``attnsteer.prefill``, which reads a prompt for the method in the pass that fills the cache."""
    watch = Watch(device)
    watch.mark()
    ready = attnsteer.prefill(teller.model, method, processor=teller.processor, **teller.inputs)
    generate(teller, tokens, watch.mark, partial(ready.generate, method))
    watch.mark()
    prefill, decode = watch.seconds()
    return Parts(prefill=prefill, decode=decode)


# ---- what is compared ------------------------------------------------------------------------------------------------
def steered(teller: tellers.Teller, options: argparse.Namespace) -> dict[str, Any]:
    """The methods beside plain sdpa and eager attention with maps."""
    chosen = methods(teller)
    cases = {"plain": partial(answer, teller, options.tokens, options.device)}
    cases[MAPS] = partial(answer, teller, options.tokens, options.device, maps=True)
    for name, method in chosen.items():
        cases[name] = partial(answer, teller, options.tokens, options.device, [method])
    shared = "GIFT by attnsteer.prefill"
    cases[shared] = partial(answer_of_prefill, teller, options.tokens, options.device, chosen["GIFT"])
    ratios = [Ratio(f"{shared}: prefill", "plain: prefill", most=PREFILL)]
    for name, most in DECODE.items():
        ratios += [Ratio(f"{name}: decode", "plain: decode", most=most)]
        ratios += [Ratio(f"{name}: prefill", "plain: prefill", most=PREFILL)]
        ratios += [Ratio(name, "plain", most=MEMORY, what="memory")]
    ratios += [Ratio(MAPS, "VAR", least=FASTER)]
    ratios += [Ratio(f"{MAPS}: {part}", f"VAR: {part}") for part in ("prefill", "decode")]
    ratios += [Ratio(MAPS, "VAR", what="memory")]
    notes = [proof(teller, chosen["VAR"])]
    return measure.report(f"decoding-{_title(teller)}", options, cases, ratios, _settings(teller, options), notes)


def idle(teller: tellers.Teller, options: argparse.Namespace) -> dict[str, Any]:
    """Attached with nothing to do: neutral strengths, and phases that do not come."""
    neutral = {
        "VHR, alpha 1": VHR(alpha=1.0),
        "PAI, alpha 0": PAI(alpha=0.0),
        "VAR, fraction 0": VAR(fraction=0.0, channels=CHANNELS, tau=TAU),
    }
    cases = {"plain": partial(answer, teller, options.tokens, options.device)}
    for name, method in neutral.items():
        cases[name] = partial(answer, teller, options.tokens, options.device, [method])
    early = "PAI in prefill alone"
    cases[early] = partial(answer, teller, options.tokens, options.device, [PAI(Where(steps="prefill"))])
    most = IDLE[options.device]
    ratios = [
        Ratio(f"{name}: {part}", f"plain: {part}", most=most) for name in neutral for part in ("prefill", "decode")
    ]
    ratios += [Ratio(f"{early}: decode", "plain: decode", most=most)]
    return measure.report(f"idle-{_title(teller)}", options, cases, ratios, _settings(teller, options))


def _title(teller: tellers.Teller) -> str:
    return f"{teller.name}-static" if teller.settings.get("cache") == "static" else teller.name


def _settings(teller: tellers.Teller, options: argparse.Namespace) -> dict[str, Any]:
    return {**teller.settings, "tokens decoded": options.tokens}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, repeats=5)
    add = parser.add_argument
    add("--model", default="llava-7b", choices=tellers.NAMES, help="default: %(default)s")
    add("--scale", type=int, help="divide layers, heads and widths (default: 8 on a CPU, 1 on a GPU)")
    add("--prompt", type=int, default=2048, help="tokens of the prompt (default: %(default)s)")
    add("--tokens", type=int, help="tokens to decode (default: 64 on a CPU, 256 on a GPU)")
    add("--static", action="store_true", help="a static cache for all")
    add("--idle", action="store_true", help="measure what is attached and has nothing to do")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.scale = options.scale or (1 if gpu or options.model == "world-llava" else 8)
    options.tokens = options.tokens or (256 if gpu else 64)
    teller = tellers.build(options.model, options.device, options.dtype, options.scale, options.prompt)
    if options.static:
        teller.settings["cache"] = "static"
    return (idle if options.idle else steered)(teller, options)


if __name__ == "__main__":
    main()
