"""HeadHunter, then SoftPAG on the heads that it found (arXiv 2506.10978).

The search is short here; a killed one goes on where it was. `attnsteer search` has all its options.

python examples/headhunter.py
python examples/headhunter.py --model stabilityai/stable-diffusion-3-medium-diffusers --objective pickscore \\
    --search-prompts "a photo of a cat" "a street at night" --layers 7 8 9 10 --rounds 3 --per-round 3 --device cuda
"""

from __future__ import annotations

from common import compare, load, options

from attnsteer import Where
from attnsteer.processors import SoftPAG
from attnsteer.search import HeadHunter, PickScore, WorldJudge


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, __file__, "world-sd3", "a dog and a car on a blue background")
    parser.add_argument("--objective", choices=["judge", "pickscore"], default="judge")
    parser.add_argument("--search-prompts", nargs="+", default=["a cat and a pizza on a green background"])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-round", type=int, default=2)
    parser.add_argument("--strength", type=float, default=0.5, help="u afterwards; the search has 1")
    given = parser.parse_args(arguments)

    pipe, call = load(given)
    # the search goes without classifier-free guidance
    plain = {name: value for name, value in call.items() if name not in ("guidance_scale", "num_inference_steps")}
    folder = given.out.with_suffix("")
    hunter = HeadHunter(
        pipe,
        WorldJudge() if given.objective == "judge" else PickScore(),
        [(prompt, given.seed + 1000 + n) for n, prompt in enumerate(given.search_prompts)],  # seeds not shown below
        k=given.per_round,
        rounds=given.rounds,
        steps=given.num_steps,
        where=Where(layers=given.layers),
        call=plain,
        out=folder,
        progress=lambda at: print(f"{at.what}: {at.done} of {at.total} pictures"),
    )
    found = hunter.run()
    print("heads:", ", ".join(map(str, found.heads)))
    method = SoftPAG.from_search(folder / "heads.json", strength=given.strength)
    compare(given, pipe, call, {f"{len(found.heads)} heads": method})


if __name__ == "__main__":
    main()
