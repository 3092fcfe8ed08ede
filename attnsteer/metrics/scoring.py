"""From files to counts: what ``attnsteer score`` does, as functions (POPE's is in ``matching``).

    captions = files.rows("captions.jsonl")
    result = score_captions(captions, ready(files.document("objects.json"), COCO))
    result.table["chair_i"].value, result.problems

Nothing is left out in silence: a line that cannot be used is among the problems.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ..errors import SteeringError
from . import amber, chair, files, hallusionbench, mme, yesno
from .files import LineError, Rows
from .objects import Objects, image_id
from .scored import Scored, each, nothing
from .words import COCO, Vocabulary, names

Source = Literal["caption", "lemmas", "nodes"]


# ---- CHAIR -----------------------------------------------------------------------------------------------------------
def score_captions(given: Rows, there: Objects, vocabulary: Vocabulary = COCO, source: Source = "caption") -> Scored:
    """CHAIR of a file of captions.

    Args:
        given: {"image_id": ..., "caption": ...} and the like; "truncated" or "finish_reason" may say how it ended.
        source: "caption" reads the text; "lemmas" a list with the lemma of every word, made elsewhere; "nodes" a list
            of the categories named.

    Raises:
        SteeringError: no line can be used.
    """
    seen: set[str] = set()

    def count(row: dict[str, Any]) -> chair.Caption:
        image = image_id(files.first(row, files.IMAGE))
        if image in seen:
            raise LineError(f"image {image} has a caption already")
        if image not in there:
            raise LineError(f"image {image} is not in the ground truth")
        found = _caption(row, image, there[image], vocabulary, source)
        seen.add(image)
        return found

    records = [record for _, record in each(given, count)]
    if not records:
        raise nothing(given)
    plain = [{**asdict(record), **record.values} for record in records]
    keys: list[Hashable] = [record.image for record in records]
    return Scored(chair.ratios(records), keys, chair.totals(records), plain, problems=given.problems)


def _caption(row: dict[str, Any], image: str, there: set[str], vocabulary: Vocabulary, source: Source) -> chair.Caption:
    text = files.string(row, files.CAPTION) if source == "caption" else row.get("caption")
    if source == "caption":
        named, length = names(vocabulary.mentions(str(text))), vocabulary.length(str(text))
    elif source == "lemmas":
        lemmas = files.strings(row, "lemmas")
        named, length = names(vocabulary.mentions_of_lemmas(lemmas)), len(vocabulary.merge(lemmas))
    else:
        named, length = [vocabulary.entries.get(name, name) for name in files.strings(row, "nodes")], None
    ended = row.get("truncated")
    if ended is None and row.get("finish_reason") is not None:
        ended = row["finish_reason"] == "length"
    return chair.caption(image, named, there, text, length, None if ended is None else bool(ended))


# ---- AMBER -----------------------------------------------------------------------------------------------------------
def score_amber(
    given: Rows,
    annotations: Sequence[Mapping[str, Any]],
    world: amber.World,
    fields: Sequence[str] = files.ANSWER,
    nouns: Mapping[str, Sequence[str]] | None = None,
    exactly: bool = False,
) -> tuple[Scored | None, dict[str, dict[str, float]], list[str]]:
    """AMBER's generative part (None without such responses), its yes/no part, and all problems.

    Args:
        given: {"id": ..., "response": ...}.
        annotations: of annotations.json.
        fields: where the response is.
        nouns: {id: nouns of the response}, found elsewhere; None finds words of the vocabulary in the text.
        exactly: answers count only if they are "Yes" or "No" to the letter.

    Raises:
        SteeringError: no line can be used.
    """
    known = {int(entry["id"]): entry for entry in annotations}
    vocabulary = world.vocabulary
    seen: set[int] = set()

    def count(row: dict[str, Any]) -> amber.Response | tuple[str, str, str]:
        number = _amber_number(row, known, seen)
        entry, text = known[number], ""
        if entry["type"] != "generative":
            text = amber.answer(files.string(row, fields), exactly)
            seen.add(number)
            return entry["type"], entry["truth"], text
        if nouns is not None and str(number) not in nouns:
            raise LineError(f"response {number} has no list of nouns")
        said = amber.nouns(files.string(row, fields), vocabulary) if nouns is None else nouns[str(number)]
        seen.add(number)
        return amber.response(number, said, entry["truth"], entry["hallu"], world)

    found = [record for _, record in each(given, count)]
    if not found:
        raise nothing(given)
    told = [record for record in found if isinstance(record, amber.Response)]
    yes_no = amber.discriminative(record for record in found if not isinstance(record, amber.Response))
    scored = None
    if told:
        keys: list[Hashable] = [record.number for record in told]
        scored = Scored(amber.ratios(told), keys, amber.totals(told), [asdict(record) for record in told])
    return scored, yes_no, given.problems


def _amber_number(row: dict[str, Any], known: Mapping[int, Any], seen: set[int]) -> int:
    value = files.first(row, files.NUMBER[::-1])
    if not str(value).isdigit() or int(value) not in known:
        raise LineError(f"id {value!r} is not in the annotations")
    if int(value) in seen:
        raise LineError(f"id {value} has a response already")
    return int(value)


# ---- MME and HallusionBench ------------------------------------------------------------------------------------------
def score_mme(folder: str | Path) -> tuple[dict[str, Scored], dict[str, float], list[str]]:
    """Every subtask of a folder of {subtask}.txt, the scores and sums, and all problems.

    Raises:
        SteeringError: the folder holds no results, or an image of a subtask has not two questions.
    """
    paths = sorted(path for path in Path(folder).glob("*.txt*") if path.suffix in (".txt", ".gz"))
    questions, problems = [], []
    for path in paths:
        for number, line in enumerate(files.text_of(path).split("\n"), start=1):
            try:
                questions += [mme.line(path.name.split(".txt")[0], line)] if line.strip() else []
            except ValueError as error:
                problems.append(f"{path}: line {number}: {error}")
    if not questions:
        raise SteeringError([f"{folder} holds no {{subtask}}.txt with results of MME.", *problems[:3]])
    try:
        scores, parts = mme.scores(questions), {}
    except SteeringError as error:
        raise SteeringError([*error.reasons, *problems[:3]]) from error
    for task, asked in mme.by_task(questions).items():
        keys: list[Hashable] = list(dict.fromkeys(question.image for question in asked))
        counts = {"questions": len(asked), "right": sum(q.right for q in asked), "images": len(keys)}
        counts["other"] = sum(mme.read(question.said) == "other" for question in asked)
        plain = [{**asdict(question), "right": question.right} for question in asked]
        parts[task] = Scored(mme.ratios(asked), keys, counts, plain, {"score": scores[task]})
    return parts, {name: scores[name] for name in mme.SUMS if name in scores}, problems


def score_hallusionbench(given: Rows, judged: str | None = None, rule: str = "words") -> Scored:
    """HallusionBench from its authors' file with an answer in every entry.

    Args:
        judged: field with a judge's verdict (0 wrong, 1 right, 2 unclear); None reads the answer by `rule`.

    Raises:
        SteeringError: no such rule, or no entry can be used.
    """
    yesno.read("", True, rule)

    def count(row: dict[str, Any]) -> hallusionbench.Question:
        try:
            if judged is None:
                return hallusionbench.answered(row, files.string(row, files.ANSWER), rule)
            verdict = str(files.first(row, (judged,)))
            if verdict not in ("0", "1", "2"):
                raise LineError(f"{judged} is {verdict!r} where 0, 1 or 2 is wanted")
            return hallusionbench.judged(row, int(verdict))
        except KeyError as error:
            raise LineError(f"has no field {error}") from error

    found = [question for _, question in each(given, count)]
    if not found:
        raise nothing(given)
    table = hallusionbench.ratios(found)
    keys: list[Hashable] = list(dict.fromkeys(question.cluster for question in found))
    counts = {"questions": len(found), "right": sum(question.right for question in found)}
    groups = {"question_groups": "q_acc", "figure_groups": "f_acc"}
    counts |= {name: int(table[metric].denominators.sum()) for name, metric in groups.items()}
    plain = [asdict(question) for question in found]
    return Scored(table, keys, counts, plain, {"overall": hallusionbench.overall(table)}, given.problems)
