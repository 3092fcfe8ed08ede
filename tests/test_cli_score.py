"""`attnsteer score`: what is read, what is counted, and that nothing is left out in silence."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from attnsteer.cli import main
from attnsteer.metrics import mme
from attnsteer.metrics.words import COCO, names
from attnsteer.world import coco, sampling, text
from tests.metrics.common import document, fixture

Capture = pytest.CaptureFixture[str]
FEW = ["--draws", "50"]


def score(capsys: Capture, *arguments: Any, code: int = 0) -> dict[str, Any]:
    """The JSON of a call; its complaints are under "stderr"."""
    assert main(["score", *(str(argument) for argument in arguments), "--json", *FEW]) == code
    captured = capsys.readouterr()
    return {**json.loads(captured.out), "stderr": captured.err}


def values(report: dict[str, Any], part: str) -> dict[str, float]:
    return {name: row["value"] for name, row in report["parts"][part]["metrics"].items()}


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines; strings are lines as they are."""
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize("name", ["chair", "pope", "amber", "mme", "hallusionbench"])
def test_every_benchmark_explains_itself_with_an_example(name: str, capsys: Capture) -> None:
    assert main(["score", name, "--help"]) == 0
    shown = capsys.readouterr().out
    for expected in ("examples:", f"attnsteer score {name}", "--against", "--strict", "--json", "--seed", "--records"):
        assert expected in shown


# ---------------------------------------------------------------------------------------------------- CHAIR

SAID = [
    {"image_id": 1, "caption": "A man and a dog sit on a bench. The dog is happy."},
    {"image_id": 2, "caption": "A cat on a couch."},
    {"image_id": 3, "caption": "Nothing here."},
]
THERE = {"1": ["person", "dog"], "2": ["cat", "couch", "tv"], "3": ["car"]}


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(THERE))
    return path


def check(report: dict[str, Any]) -> None:
    counts = report["parts"]["captions"]["counts"]
    assert (counts["captions"], counts["hallucinated_mentions"], counts["mentions"]) == (3, 1, 6)
    assert (counts["recalled"], counts["gt_objects"], counts["distinct_generated"]) == (4, 6, 5)
    assert report["made_up"] == {"bench": 1} and report["bad_lines"] == 0


def test_chair_by_hand(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    report = score(capsys, "chair", "--captions", write(tmp_path / "a.jsonl", SAID), "--objects", objects)
    check(report)
    assert values(report, "captions")["f1"] == pytest.approx(8 / 11)
    assert report["settings"]["lemmatiser"] == "rules" and report["settings"]["synonyms_digest"] == COCO.digest
    assert report["bootstrap"] == {"draws": 50, "level": 0.95, "seed": 0}


def other_names(image: str, caption: str) -> list[dict[str, Any]]:
    return [{image: f"COCO_val2014_{row['image_id']:012d}.jpg", caption: row["caption"]} for row in SAID]


@pytest.mark.parametrize(
    ("image", "caption"), [("image", "answer"), ("file_name", "text"), ("image_id", "response"), ("filename", "output")]
)
def test_common_names_of_fields(image: str, caption: str, tmp_path: Path, objects: Path, capsys: Capture) -> None:
    path = write(tmp_path / "a.jsonl.gz", other_names(image, caption))
    check(score(capsys, "chair", "--captions", path, "--objects", objects))


def test_a_json_list_is_read_too(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SAID, indent=1))
    check(score(capsys, "chair", "--captions", tmp_path / "a.json", "--objects", objects))


def test_lemmas_and_nodes_made_elsewhere(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    named = [names(COCO.mentions(row["caption"])) for row in SAID]
    for source in ("lemmas", "nodes"):
        rows = [{"image_id": row["image_id"], source: named[i]} for i, row in enumerate(SAID)]
        path = write(tmp_path / f"{source}.jsonl", rows)
        report = score(capsys, "chair", "--captions", path, "--objects", objects, "--source", source)
        check(report)
        assert report["settings"]["lemmatiser"] == "given"
        assert ("length" in values(report, "captions")) == (source == "lemmas")


def test_truncated_captions_are_counted_where_known(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    rows = [{**row, "finish_reason": end} for row, end in zip(SAID, ("length", "stop", "stop"), strict=True)]
    report = score(capsys, "chair", "--captions", write(tmp_path / "a.jsonl", rows), "--objects", objects)
    assert values(report, "captions")["truncated"] == pytest.approx(1 / 3)


BAD: list[tuple[Any, str]] = [
    ('{"image_id": 1, "caption": ', r"line 4: not JSON"),
    ("[1, 2]", r"line 4: no JSON object"),
    ({"caption": "A dog."}, r"line 4: has none of the fields image_id"),
    ({"image_id": 3}, r"line 4: has none of the fields caption"),
    ({"image_id": 9, "caption": "A dog."}, r"line 4: image 9 is not in the ground truth"),
    ({"image_id": 2, "caption": "A dog."}, r"line 4: image 2 has a caption already"),
    ({"image_id": 3, "caption": ["A dog."]}, r"line 4: caption is \['A dog\.'\] and no text"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_bad_lines_are_named_and_counted(line: Any, why: str, tmp_path: Path, objects: Path, capsys: Capture) -> None:
    first = SAID[:2] if isinstance(line, dict) and line.get("image_id") == 3 else SAID
    path = write(tmp_path / "a.jsonl", [*first, *([""] if len(first) == 2 else []), line])  # empty lines count
    arguments = ("chair", "--captions", path, "--objects", objects)
    report = score(capsys, *arguments)
    assert report["bad_lines"] == 1 and re.search(why, report["problems"][0])
    assert re.search(why, report["stderr"]) and "1 problems" in report["stderr"]
    assert report["parts"]["captions"]["counts"]["captions"] == len(first)
    assert score(capsys, *arguments, "--strict", code=1)["bad_lines"] == 1


def test_strict_is_content_with_good_files(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    score(capsys, "chair", "--captions", write(tmp_path / "a.jsonl", SAID), "--objects", objects, "--strict")


def test_two_runs_are_compared_image_by_image(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    plain = write(tmp_path / "plain.jsonl", SAID)
    steered = [{"image_id": 3, "caption": "A car."}, {"image_id": 1, "caption": "A dog."}, SAID[1]]  # another order
    arguments = ("chair", "--captions", write(tmp_path / "a.jsonl", steered), "--against", plain, "--objects", objects)
    effects = score(capsys, *arguments)["parts"]["captions"]["differences"]
    assert effects["chair_s"]["delta"] == pytest.approx(-1 / 3) and effects["recall"]["delta"] == pytest.approx(0)
    assert effects["chair_i"]["baseline"] == pytest.approx(1 / 6) and effects["chair_i"]["high"] == 0
    assert effects["chair_i"]["samples"] == 3 and effects["chair_i"]["resolvable"] > 0
    write(tmp_path / "a.jsonl", steered[:2])
    assert "1 samples are in one of the two runs only" in score(capsys, *arguments, "--strict", code=1)["stderr"]
    assert main(["score", *map(str, arguments), *FEW]) == 0
    assert re.search(r"chair_s +0\.00 %  95 % \[0\.00, 0\.00\]   -50\.00 \[", capsys.readouterr().out)


def test_records_recompute_every_total(tmp_path: Path, objects: Path, capsys: Capture) -> None:
    records = tmp_path / "records.jsonl"
    path = write(tmp_path / "a.jsonl", SAID)
    report = score(capsys, "chair", "--captions", path, "--objects", objects, "--records", records)
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert [row["image"] for row in rows] == ["1", "2", "3"]
    counts = report["parts"]["captions"]["counts"]
    assert sum(row["mentions"] for row in rows) == counts["mentions"]
    assert sum(len(row["made_up"]) for row in rows) == counts["hallucinated_mentions"]


def test_the_small_world_is_scored_by_its_own_annotations(tmp_path: Path, capsys: Capture) -> None:
    scenes = list(sampling.stream("test", 6, 3))
    coco.export(tmp_path, scenes, "test")
    annotations = tmp_path / "annotations"
    truth = ("--instances", annotations / "instances_test.json", "--captions-gt", annotations / "captions_test.json")
    said = [{"image": f"test_{n:012d}.png", "caption": text.describe(scene)} for n, scene in enumerate(scenes, 1)]
    path, kept = write(tmp_path / "said.jsonl", said), tmp_path / "objects.json"
    report = score(capsys, "chair", "--captions", path, *truth, "--write-objects", kept)
    assert values(report, "captions")["chair_s"] == 0 and values(report, "captions")["recall"] == 1
    assert report["settings"]["ground_truth"] == "instances and captions (lemmatiser rules)"
    again = score(capsys, "chair", "--captions", path, "--objects", kept)
    assert again["parts"] == report["parts"]
    (tmp_path / "words.txt").write_text("dog, puppy\n")
    other = [
        "score",
        "chair",
        "--captions",
        str(path),
        "--objects",
        str(kept),
        "--synonyms",
        str(tmp_path / "words.txt"),
    ]
    assert main(other) == 2
    assert "read from captions in another way" in capsys.readouterr().err
    labels = annotations / "questions_test.jsonl"
    asked = [json.loads(line) for line in labels.read_text().splitlines()]
    labels = write(tmp_path / "labels.jsonl", [question for question in asked if "label" in question])
    report = score(capsys, "pope", "--labels", labels, "--answers", labels)  # its "answer" is the true one
    assert values(report, "all")["accuracy"] == 1 and values(report, "all")["yes"] == 0.5


def test_chair_of_published_files(tmp_path: Path, capsys: Capture) -> None:
    wanted = document("chair/expected.json")["opera_llava-1.5_greedy"]["nltk/gt_nltk"]
    captions, truth = fixture("chair/nodes_opera_llava-1.5_greedy.json.gz"), fixture("chair/gt_nltk.json.gz")
    report = score(capsys, "chair", "--captions", captions, "--objects", truth, "--source", "nodes")
    counts = report["parts"]["captions"]["counts"]
    assert counts == {name: wanted[name] for name in counts}


# ---------------------------------------------------------------------------------------------------- POPE

LABELS = [
    {
        "question_id": n,
        "image": f"COCO_val2014_{n // 2:012d}.jpg",
        "text": f"Is there a {name} in the image?",
        "label": truth,
    }
    for n, (name, truth) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes"), ("bed", "no")])
]
WORDS = ["Yes", "Yes, there is.", "no", "No."]


def pope(capsys: Capture, tmp_path: Path, answers: list[Any], *more: Any, code: int = 0, labels: Any = LABELS) -> Any:
    paths = write(tmp_path / "labels.json", labels), write(tmp_path / "answers.jsonl", answers)
    return score(capsys, "pope", "--labels", paths[0], "--answers", paths[1], *more, code=code)


def test_pope_line_by_line_and_by_number(tmp_path: Path, capsys: Capture) -> None:
    report = pope(
        capsys, tmp_path, [{"question": row["text"], "answer": w} for row, w in zip(LABELS, WORDS, strict=True)]
    )
    wanted = {"tp": 1, "fp": 1, "tn": 1, "fn": 1, "neither": 0, "unparsed": 0, "questions": 4}
    assert report["parts"]["all"]["counts"] == wanted and report["settings"] == {"rule": "pope"}
    assert report["parts"]["all"]["metrics"]["f1"]["samples"] == 2  # images
    numbered = [{"question_id": n, "text": word} for n, word in enumerate(WORDS)]
    mixed = pope(capsys, tmp_path, [numbered[n] for n in (2, 0, 3, 1)])
    assert mixed["parts"]["all"]["counts"] == wanted


def test_pope_rules_are_chosen_by_name(tmp_path: Path, capsys: Capture) -> None:
    answers = [{"answer": word} for word in ("NO", "There isn't", "well", "yes")]
    counted = {
        rule: pope(capsys, tmp_path, answers, "--rule", rule)["parts"]["all"]["counts"] for rule in ("pope", "opera")
    }
    assert (counted["pope"]["tp"], counted["opera"]["tp"]) == (2, 1)
    assert (counted["pope"]["fp"], counted["opera"]["fp"]) == (2, 1)
    assert counted["pope"]["unparsed"] == counted["opera"]["unparsed"] == 2


def test_a_bad_answer_does_not_shift_the_others(tmp_path: Path, capsys: Capture) -> None:
    answers: list[Any] = [{"answer": word} for word in WORDS]
    answers[1] = "{broken"
    report = pope(capsys, tmp_path, answers)
    assert report["parts"]["all"]["counts"]["questions"] == 3 and report["bad_lines"] == 1
    assert (report["parts"]["all"]["counts"]["fp"], report["parts"]["all"]["counts"]["tn"]) == (0, 1)
    assert "line 2: not JSON" in report["stderr"]
    assert pope(capsys, tmp_path, answers, "--strict", code=1)["bad_lines"] == 1


def test_pope_dialogues_of_six_questions(tmp_path: Path, capsys: Capture) -> None:
    keys = ("text", "label")
    folded = [
        {"image": LABELS[n]["image"], **{key: [row[key] for row in LABELS[n : n + 2]] for key in keys}} for n in (0, 2)
    ]
    report = pope(capsys, tmp_path, [{"answer": WORDS[:2]}, {"answer": WORDS[2:]}], labels=folded)
    assert [report["parts"]["all"]["counts"][name] for name in ("tp", "fp", "tn", "fn")] == [1, 1, 1, 1]


def refused(capsys: Capture, *arguments: Any) -> str:
    assert main(["score", *(str(argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_pope_files_that_do_not_belong_together(tmp_path: Path, capsys: Capture) -> None:
    labels = write(tmp_path / "labels.json", LABELS)
    short = write(tmp_path / "short.jsonl", [{"answer": "Yes"}] * 3)
    assert "4 questions and" in refused(capsys, "pope", "--labels", labels, "--answers", short)
    shifted = [{"question": LABELS[(n + 1) % 4]["text"], "answer": "Yes"} for n in range(4)]
    wrong = write(tmp_path / "wrong.jsonl", shifted)
    said = refused(capsys, "pope", "--labels", labels, "--answers", wrong)
    assert "line 1, answers about 'cat', and its question is about 'dog'" in said
    both = ("--labels", f"random={labels}", "--labels", f"popular={labels}")
    assert "name the same splits" in refused(capsys, "pope", *both, "--answers", f"random={labels}")
    assert "need different names" in refused(capsys, "pope", *both[:2], "--labels", labels, "--answers", labels)


def test_pope_of_published_files(capsys: Capture) -> None:
    labels = {"adversarial": "adversarial_e3e3926", "popular": "popular_e3e3926", "random": "random_2910"}
    files = [f"--labels={split}={fixture(f'pope/coco_pope_{name}.json.gz')}" for split, name in labels.items()]
    answers, questions = fixture("pope/answers_llava-v1.5-13b.jsonl.gz"), fixture("pope/llava_pope_test.jsonl.gz")
    report = score(capsys, "pope", *files, "--answers", answers, "--questions", questions)
    found = {
        split: [part["counts"][name] for name in ("tp", "fp", "tn", "fn")] for split, part in report["parts"].items()
    }
    assert found == {
        "adversarial": [1182, 117, 1383, 318],
        "popular": [1182, 59, 1441, 318],
        "random": [1182, 31, 1379, 318],
    }
    assert report["mean_f1"] == pytest.approx(0.8594688091, abs=1e-10)
    assert report["pooled_f1"] == pytest.approx(2 * 3546 / (2 * 3546 + 207 + 954))
    again = score(capsys, "pope", *files, "--answers", answers, "--questions", questions, "--against", answers)
    assert all(part["differences"]["f1"]["p"] == 1 for part in again["parts"].values())


# ---------------------------------------------------------------------------------------------------- AMBER


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "amber"
    folder.mkdir()
    (folder / "relation.json").write_text(json.dumps({"dog": ["puppy"], "cat": [], "car": []}))
    (folder / "safe_words.txt").write_text("car\n")
    state = "discriminative-attribute-state"
    annotations: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
        {"id": 2, "type": state, "truth": "yes"},
        {"id": 3, "type": state, "truth": "no"},
    ]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_amber_by_hand(tmp_path: Path, data: Path, capsys: Capture) -> None:
    said = [
        {"id": 1, "response": "Puppies, cats and a car."},
        {"id": 2, "response": "yes."},
        {"id": 3, "response": "No"},
    ]
    path = write(tmp_path / "said.jsonl", said)
    report = score(capsys, "amber", "--responses", path, "--data", data)
    assert values(report, "generative") == pytest.approx({"chair": 1 / 3, "cover": 1, "hal": 1, "cog": 1})
    assert report["discriminative"]["state"]["accuracy"] == 100
    assert report["amber_score"] == pytest.approx((100 - 100 / 3 + report["discriminative"]["all"]["f1"]) / 2)
    exact = score(capsys, "amber", "--responses", path, "--data", data, "--exact")
    assert exact["discriminative"]["state"]["accuracy"] == 50 and exact["settings"]["answers"] == "exact"
    (tmp_path / "nouns.json").write_text(json.dumps({"1": ["dog"]}))
    given = score(capsys, "amber", "--responses", path, "--data", data, "--nouns", tmp_path / "nouns.json")
    assert values(given, "generative")["chair"] == 0 and given["settings"]["nouns"] == "given"


def test_amber_bad_lines(tmp_path: Path, data: Path, capsys: Capture) -> None:
    said = [{"id": 3, "response": "No"}, {"id": 3, "response": "Yes"}, {"id": 4, "response": "No"}, {"response": "No"}]
    path = write(tmp_path / "said.jsonl", said)
    report = score(capsys, "amber", "--responses", path, "--data", data, "--strict", code=1)
    assert report["parts"] == {} and report["discriminative"]["all"]["questions"] == 1
    assert [re.sub(r".*line", "line", problem) for problem in report["problems"]] == [
        "line 2: id 3 has a response already",
        "line 3: id 4 is not in the annotations",
        "line 4: has none of the fields id, question_id",
    ]


def test_amber_of_published_files(capsys: Capture) -> None:
    nouns, said = fixture("amber/nouns_LLaVA_response_512.json.gz"), fixture("amber/caac_LLaVA.json.gz")
    arguments = ("--responses", said, "--field", "response_512", "--nouns", nouns)
    report = score(capsys, "amber", "--data", said.parent, *arguments)
    assert report["bad_lines"] == 0
    counts = report["parts"]["generative"]["counts"]
    assert (counts["flagged"], counts["nouns"], counts["clean_responses"]) == (478, 8551, 745)
    wanted = document("amber/expected.json")["LLaVA"]["discriminative"]
    assert {name: row["f1"] for name, row in report["discriminative"].items()} == {
        n: r["F1"] for n, r in wanted.items()
    }


# ---------------------------------------------------------------------------------------------------- groups


def test_mme_by_hand(tmp_path: Path, capsys: Capture) -> None:
    for task in mme.HALLUCINATION:
        rows = [
            "1.jpg\tIs it?\tYes\tyes",
            "1.jpg\tIs it?\tNo\tYes",
            "2.jpg\tIs it?\tYes\tYes.",
            "2.jpg\tIs it?\tNo\tno",
        ]
        write(tmp_path / f"{task}.txt", rows)
    report = score(capsys, "mme", tmp_path, "--against", tmp_path)
    assert report["hallucination"] == 4 * 125 and "perception" not in report
    assert report["parts"]["count"]["score"] == 125
    assert report["parts"]["count"]["counts"] == {"questions": 4, "right": 3, "images": 2, "other": 0}
    write(tmp_path / "count.txt", [*rows[:3], "2.jpg\tIs it?"])
    said = refused(capsys, "mme", tmp_path)
    assert "without exactly two questions: 2.jpg (1)" in said and "count.txt: line 4: 2 parts" in said
    (tmp_path / "none").mkdir()
    assert "holds no {subtask}.txt" in refused(capsys, "mme", tmp_path / "none")


def test_hallusionbench_of_the_published_questions(tmp_path: Path, capsys: Capture) -> None:
    rows = document("hallusionbench/HallusionBench.json.gz")
    answered = [{**row, "model_prediction": "Yes, it is.", "verdict": row["gt_answer"]} for row in rows]
    path = write(tmp_path / "said.jsonl.gz", answered)
    report = score(capsys, "hallusionbench", "--answers", path)
    found = [round(100 * values(report, "questions")[name], 4) for name in ("a_acc", "q_acc", "f_acc")]
    assert found == [42.8698, 3.9560, 7.2254]
    counts = report["parts"]["questions"]["counts"]
    assert counts == {"questions": 1129, "right": 484, "question_groups": 455, "figure_groups": 346}
    judged = score(capsys, "hallusionbench", "--answers", path, "--judged", "verdict")
    assert values(judged, "questions") == values(report, "questions") and judged["settings"] == {"judge": "verdict"}


def test_hallusionbench_bad_lines(tmp_path: Path, capsys: Capture) -> None:
    keys = ("category", "subcategory", "set_id", "question_id", "figure_id", "visual_input")
    whole = {**dict.fromkeys(keys, "1"), "gt_answer": "1", "answer": "Yes", "verdict": 3}
    lacking = {key: value for key, value in whole.items() if key != "set_id"}
    path = write(tmp_path / "said.jsonl", [whole, lacking])
    report = score(capsys, "hallusionbench", "--answers", path, "--strict", code=1)
    assert report["parts"]["questions"]["counts"]["questions"] == 1
    assert report["problems"] == [f"{path}: line 2: has no field 'set_id'"]
    assert "verdict is '3' where 0, 1 or 2" in refused(
        capsys, "hallusionbench", "--answers", path, "--judged", "verdict"
    )


# ---------------------------------------------------------------------------------------------------- requests


WRONG = {
    "no ground truth": (["chair", "--captions", "{a}"], "give one of them"),
    "two ground truths": (["chair", "--captions", "{a}", "--objects", "{o}", "--instances", "{o}"], "give one of them"),
    "nothing usable": (["chair", "--captions", "{o}", "--objects", "{o}"], "No line of .*objects.json can be used"),
    "no instances": (["chair", "--captions", "{a}", "--instances", "{o}"], "list 'categories'"),
    "no JSON": (["chair", "--captions", "{a}", "--objects", "{a}"], "is not JSON: line 2"),
    "no text": (["chair", "--captions", "{b}", "--objects", "{o}"], "cannot be read as text"),
    "no number": (["chair", "--captions", "{a}", "--objects", "{o}", "--level", "1"], "more than 0 and less than 1"),
    "no benchmark": (["bleu"], "invalid choice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, tmp_path: Path, objects: Path, capsys: Capture) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x00\xff\xfe")
    paths = {"a": write(tmp_path / "a.jsonl", SAID), "o": objects, "b": tmp_path / "b.jsonl.gz"}
    arguments, sentence = WRONG[case]
    assert re.search(sentence, refused(capsys, *(argument.format(**paths) for argument in arguments)))


def test_a_missing_file_is_an_error_of_the_run(objects: Path, capsys: Capture) -> None:
    assert main(["score", "chair", "--captions", "nowhere.jsonl", "--objects", str(objects)]) == 1
    assert "No such file" in capsys.readouterr().err
