"""``attnsteer score``: hallucination metrics from files of captions and answers, whoever made them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteeringError
from . import score_geneval, score_pictures, tables

if TYPE_CHECKING:
    from ..metrics.files import Rows
    from ..metrics.scored import Scored
    from ..metrics.words import Vocabulary

RULES = ("pope", "opera", "substring", "exact", "words")  # of metrics.yesno, which imports numpy
FILES = "JSON lines or a JSON list, also .gz"
AGAINST = "the other run, for paired differences with intervals"


def add(subparsers: Any) -> None:
    examples = (
        "score chair --captions answers.jsonl --instances instances_val2014.json --captions-gt captions_val2014.json",
        "score pope --labels coco_pope_random.json --answers answers.jsonl",
        "score pictures --prompts prompts.txt --images steered/ --baseline plain/ --clip openai/clip-vit-base-patch16",
    )
    about = "Metrics of captions and answers (hallucination) and of pictures, with bootstrap intervals."
    parser = subparsers.add_parser(
        "score",
        help=about,
        description=about,
        epilog="examples:\n" + "".join(f"  attnsteer {example}\n" for example in examples)
        + "all take --seed, --device, --dtype and --json: see attnsteer score chair --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = "{chair,pope,amber,mme,hallusionbench,pictures,geneval}"
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar=names)
    adding = (_add_chair, _add_pope, _add_amber, _add_mme, _add_hallusionbench)
    for add in (*adding, score_pictures.add, score_geneval.add):
        add(commands)


# ---- CHAIR -----------------------------------------------------------------------------------------------------------
def _add_chair(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "chair",
        chair,
        "CHAIR: share of captions, and of the objects that they name, that are made up; recall, precision, length.",
        [
            "score chair --captions a.jsonl --instances instances_val2014.json --captions-gt captions_val2014.json",
            "score chair --captions steered.jsonl --against plain.jsonl --objects objects.json --json",
        ],
    )
    add = parser.add_argument
    add("--captions", required=True, metavar="FILE", help=f'{FILES}: {{"image_id": 42, "caption": "A dog."}}')
    add("--against", metavar="FILE", help=AGAINST)
    add("--instances", metavar="FILE", help="ground truth: COCO's instances_*.json")
    add("--captions-gt", metavar="FILE", help="ground truth: COCO's captions_*.json (the metric is defined with both)")
    add("--objects", metavar="FILE", help="ground truth ready-made: {image id: [category, ...]}")
    add("--write-objects", metavar="FILE", help="keep the ground truth for --objects")
    add("--synonyms", metavar="FILE", help="another table: lines such as: car, automobile, van")
    add(
        "--source",
        choices=("caption", "lemmas", "nodes"),
        default="caption",
        help="what to count: the text (default), a list of lemmas made elsewhere, or of categories",
    )


def chair(given: argparse.Namespace) -> int:
    from ..metrics import files, scoring
    from ..metrics.objects import made_by, write
    from ..metrics.words import COCO, Vocabulary

    vocabulary = Vocabulary.load(given.synonyms) if given.synonyms else COCO
    there, truth = _ground_truth(given, vocabulary)
    settings = {"source": given.source, **made_by(vocabulary), "ground_truth": truth}
    if given.source != "caption":
        settings |= {"lemmatiser": "given", "tokeniser": "given"}
    captions, other = files.rows(given.captions), files.rows(given.against) if given.against else None
    if given.write_objects:
        wanted = _images(captions) | (_images(other) if other else set())
        kept = {image: kinds for image, kinds in there.items() if image in wanted}
        write(given.write_objects, kept, vocabulary, [p for p in (given.instances, given.captions_gt) if p])
    scored = scoring.score_captions(captions, there, vocabulary, given.source)
    others = None
    if other is not None:
        others = {"captions": scoring.score_captions(other, there, vocabulary, given.source)}
    often = Counter(name for record in scored.records for name in record["made_up"])
    return tables.report(given, settings, {"captions": scored}, others, {"made_up": dict(often.most_common())})


def _images(given: Rows) -> set[str]:
    from ..metrics import files, objects

    named = (next((row[name] for name in files.IMAGE if row.get(name) is not None), None) for _, row in given)
    return {objects.image_id(image) for image in named if image is not None}


def _ground_truth(given: argparse.Namespace, vocabulary: Vocabulary) -> tuple[dict[str, set[str]], str]:
    from ..metrics import files, objects
    from ..metrics.words import LEMMATISER

    annotations = [path for path in (given.instances, given.captions_gt) if path]
    if bool(annotations) == bool(given.objects):
        raise SteeringError("Ground truth is --instances with --captions-gt, or --objects alone: give one of them.")
    if given.objects:
        return objects.ready(files.document(given.objects), vocabulary), "objects"
    documents = [files.document(path) if path else None for path in (given.instances, given.captions_gt)]
    kinds = [name for name, path in (("instances", given.instances), ("captions", given.captions_gt)) if path]
    truth = " and ".join(kinds) + (f" (lemmatiser {LEMMATISER})" if given.captions_gt else "")
    return objects.present(documents[0], documents[1], vocabulary), truth


# ---- POPE ------------------------------------------------------------------------------------------------------------
def _add_pope(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "pope",
        pope,
        "POPE: accuracy, precision, recall, F1 and share of yes of answers about objects that are there or not.",
        [
            "score pope --labels coco_pope_random.json --answers answers.jsonl",
            "score pope --labels random=r.json --labels popular=p.json --answers random=ra.jsonl "
            "--answers popular=pa.jsonl",
            "score pope --labels random=coco_pope_random.json --answers answers.jsonl "
            "--questions llava_pope_test.jsonl",
        ],
    )
    add = parser.add_argument
    add(
        "--labels",
        required=True,
        action="append",
        metavar="[SPLIT=]FILE",
        help=f'{FILES}: {{"question_id": 1, "image": ..., "text": ..., "label": "yes"}} (repeatable)',
    )
    add("--answers", required=True, action="append", metavar="[SPLIT=]FILE", help='{"answer": "Yes"} (repeatable)')
    add("--against", action="append", metavar="[SPLIT=]FILE", help=AGAINST)
    add("--questions", metavar="FILE", help="divides one file of answers by its field category, which is the SPLIT")
    add("--rule", choices=RULES, default="pope", help="how answers are read (default: pope)")


def pope(given: argparse.Namespace) -> int:
    labels = _named(given.labels, "--labels")
    parts = _splits(given, labels, given.answers, "--answers")
    others = _splits(given, labels, given.against, "--against") if given.against else None
    extra = {}
    if len(parts) > 1:
        extra["mean_f1"] = sum(part.table["f1"].value for part in parts.values()) / len(parts)
        pooled = {name: sum(part.counts[name] for part in parts.values()) for name in ("tp", "fp", "fn")}
        extra["pooled_f1"] = 2 * pooled["tp"] / max(1, 2 * pooled["tp"] + pooled["fp"] + pooled["fn"])
    return tables.report(given, {"rule": given.rule}, parts, others, extra)


def _splits(given: argparse.Namespace, labels: Mapping[str, str], paths: list[str], option: str) -> dict[str, Scored]:
    from ..metrics import files
    from ..metrics.matching import of_category, score_yes_no

    answers: dict[str, Rows]
    if given.questions:
        if len(paths) != 1:
            raise SteeringError(f"{option}: with --questions one file has the answers of all splits.")
        questions, whole = files.rows(given.questions), files.rows(paths[0])
        answers = {split: of_category(questions, whole, split) for split in labels}
    else:
        named = _named(paths, option)
        if set(named) != set(labels):
            raise SteeringError(
                f"{option} is for {', '.join(named)} and --labels for {', '.join(labels)}: name the same splits."
            )
        answers = {split: files.rows(path) for split, path in named.items()}
    return {split: score_yes_no(files.rows(path), answers[split], given.rule) for split, path in labels.items()}


def _named(paths: list[str], option: str) -> dict[str, str]:
    """``random=FILE`` by name; a single file may have none."""
    if len(paths) == 1 and ("=" not in paths[0] or Path(paths[0]).exists()):
        return {"all": paths[0]}
    pairs = [path.partition("=") for path in paths]
    if not all(name and file for name, _, file in pairs) or len({name for name, _, _ in pairs}) != len(pairs):
        raise SteeringError(
            f"{option}: several files need different names: {option} random=FILE {option} popular=FILE."
        )
    return {name: file for name, _, file in pairs}


# ---- AMBER -----------------------------------------------------------------------------------------------------------
def _add_amber(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "amber",
        amber,
        "AMBER: made-up objects in descriptions, and yes/no questions; with the files of its authors.",
        [
            "score amber --responses answers.json --data AMBER/data",
            "score amber --responses answers.json --data AMBER/data --nouns nouns.json --exact --json",
        ],
    )
    add = parser.add_argument
    add("--responses", required=True, metavar="FILE", help=f'{FILES}: {{"id": 1, "response": ...}}')
    add("--against", metavar="FILE", help=AGAINST)
    add("--data", required=True, metavar="DIR", help="has annotations.json, relation.json and safe_words.txt")
    add("--field", metavar="NAME", help="where the response is (default: response, answer, ...)")
    add("--nouns", metavar="FILE", help="{id: [noun, ...]}: nouns of --responses that a tagger found")
    add(
        "--exact", action="store_true", help='only "Yes" and "No" to the letter are answers, as in the authors\' script'
    )


def amber(given: argparse.Namespace) -> int:
    from ..metrics import files, scoring
    from ..metrics.amber import World, amber_score

    if given.nouns and given.against:
        raise SteeringError("--nouns are those of --responses: leave out --against, whose nouns are others.")
    folder = Path(given.data)
    world = World(files.document(_either(folder, "relation.json")), _safe_words(folder))
    annotations = files.document(_either(folder, "annotations.json"))
    nouns = files.document(given.nouns) if given.nouns else None
    fields = (given.field, *files.ANSWER) if given.field else files.ANSWER

    def scored(path: str) -> tuple[Scored | None, dict[str, dict[str, float]], list[str]]:
        return scoring.score_amber(files.rows(path), annotations, world, fields, nouns, given.exact)

    told, yes_no, problems = scored(given.responses)
    parts = {"generative": told} if told else {}
    extra: dict[str, Any] = {"discriminative": yes_no} if yes_no else {}
    if told and yes_no:
        extra["amber_score"] = amber_score(100 * told.table["chair"].value, yes_no["all"]["f1"])
    others = None
    if given.against:
        theirs, their_answers, more = scored(given.against)
        others, problems = {"generative": theirs} if theirs else {}, problems + more
        extra |= {"against_discriminative": their_answers} if their_answers else {}
    settings = {"nouns": "given" if given.nouns else "words of the vocabulary", "similarity": "none"}
    settings["answers"] = "exact" if given.exact else "first word"
    return tables.report(given, settings, parts, others, extra, problems)


def _either(folder: Path, name: str) -> Path:
    """The file, or the same with .gz."""
    packed = folder / f"{name}.gz"
    return packed if packed.exists() else folder / name


def _safe_words(folder: Path) -> frozenset[str]:
    from ..metrics import files

    return frozenset(files.text_of(_either(folder, "safe_words.txt")).split())


# ---- MME and HallusionBench ------------------------------------------------------------------------------------------
def _add_mme(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "mme",
        mme,
        "MME: accuracy, accuracy of both questions of an image, and scores of every subtask.",
        ["score mme results/", "score mme steered/ --against plain/ --json"],
    )
    parser.add_argument("folder", metavar="DIR", help="has {subtask}.txt: image, question, truth, answer between tabs")
    parser.add_argument("--against", metavar="DIR", help=AGAINST)


def mme(given: argparse.Namespace) -> int:
    from ..metrics import scoring

    parts, sums, problems = scoring.score_mme(given.folder)
    others = None
    if given.against:
        others, their_sums, more = scoring.score_mme(given.against)
        sums |= {f"against_{name}": value for name, value in their_sums.items()}
        problems += more
    return tables.report(given, {"rule": "first four characters"}, parts, others, sums, problems)


def _add_hallusionbench(commands: Any) -> None:
    parser = tables.benchmark(
        commands,
        "hallusionbench",
        hallusionbench,
        "HallusionBench: accuracy of questions, of questions over all their images, and of images.",
        [
            "score hallusionbench --answers HallusionBench_result.json",
            "score hallusionbench --answers judged.json --judged model_correctness --json",
        ],
    )
    add = parser.add_argument
    add("--answers", required=True, metavar="FILE", help="the authors' HallusionBench.json with answers in it")
    add("--against", metavar="FILE", help=AGAINST)
    add("--judged", metavar="FIELD", help="has a judge's verdict: 0 wrong, 1 right, 2 unclear; else answers are read")
    add("--rule", choices=RULES, default="words", help="how answers are read without a judge (default: words)")


def hallusionbench(given: argparse.Namespace) -> int:
    from ..metrics import files, scoring

    parts, others = (
        {"questions": scoring.score_hallusionbench(files.rows(path), given.judged, given.rule)} if path else None
        for path in (given.answers, given.against)
    )
    settings = {"judge": given.judged} if given.judged else {"rule": given.rule}
    return tables.report(given, settings, parts or {}, others)
