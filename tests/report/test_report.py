"""The report: what it reads of run folders in any state, which transcripts it takes, and what its page may hold.

tests/report/test_report_page.py opens pages in a browser.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from report_data import data_of, embedded, record, write_run
from simulated_run import make_evaluation, make_run

from spell_megatron.cli import main
from spell_megatron.errors import UserError
from spell_megatron.report.comparison import table
from spell_megatron.report.panels import sections
from spell_megatron.report.report import write_report
from spell_megatron.report.runs import read_run
from spell_megatron.report.transcripts import read_questions
from spell_megatron.selfplay.outcomes import Outcome

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- ]]> {{data}} & \u2028 \\ud800 \"'"
STEPS = 7


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """A run whose policy writes hostile text; tests that change it take a copy."""
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", STEPS, remark=HOSTILE)


def rollouts(run: Path, step: int) -> list[dict]:
    with (run / "rollouts" / f"step_{step:06d}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_a_run_that_is_still_going_says_so(simulated, tmp_path):
    folder = shutil.copytree(simulated, tmp_path / "going")
    whole = read_run(simulated, "run")
    assert whole.notes == [] and whole.planned == STEPS
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    message = write_report([folder], tmp_path / "report.html")
    assert f"going: step 3 of {STEPS}: still going, or stopped early" in message
    assert "going: The run ended before its last step: Nothing says that it is still going" in message
    steps = {q["step"] for q in embedded((tmp_path / "report.html").read_text(), "transcripts-data")}
    assert steps == {1, 2, 3}  # the files of step 4 and on are an earlier life's, or of a step that is not done


def test_a_run_without_transcripts(tmp_path):
    run = make_run(tmp_path / "silent", 2, dump="none")
    message = write_report([run], tmp_path / "report.html")
    assert "0 questions with transcripts" in message and "logging.dump: none" in message
    assert embedded((tmp_path / "report.html").read_text(), "transcripts-data") == []


def test_folders_that_cannot_be_reported(simulated, tmp_path):
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match=r"is not the folder of a run.*It holds such folders, though: .*hostile"):
        write_report([simulated.parent], out)
    with pytest.raises(UserError, match="is not the folder of a run or an evaluation: it has none of"):
        write_report([tmp_path / "nowhere"], out)
    empty = write_run(tmp_path / "empty")
    with pytest.raises(UserError, match=r"nothing to report yet: .*empty has not logged a step"):
        write_report([empty], out)
    with pytest.raises(UserError, match="named twice"):
        write_report([simulated, simulated / ".." / simulated.name], out)
    assert not out.exists()
    assert "empty: has not logged a step yet" in write_report([simulated, empty], out)
    assert [run["name"] for run in embedded(out.read_text(), "data")["runs"]] == ["hostile", "empty"]


def test_runs_of_the_same_name_are_told_apart(simulated, tmp_path):
    other = shutil.copytree(simulated, tmp_path / "other" / "hostile")
    settings = (other / "config.yaml").read_text().replace("group_size: 4", "group_size: 8")
    (other / "config.yaml").write_text(settings)
    write_report([simulated, other], tmp_path / "report.html", transcripts=0)
    data = embedded((tmp_path / "report.html").read_text(), "data")
    assert [run["name"] for run in data["runs"]] == [f"{simulated.parent.name}/hostile", "other/hostile"]
    assert data["settings"] == [["selfplay.group_size", "4", "8"]]


@pytest.mark.parametrize("dump", ["jsonl", "parquet"])
def test_a_question_comes_with_all_that_became_of_it(tmp_path, dump):
    run = make_run(tmp_path / "run", 2, dump=dump)
    notes: list[str] = []
    questions = read_questions(run / "rollouts" / f"step_000002.{dump}", 1000, 10**6, 0, notes)
    rows = rollouts(make_run(tmp_path / "same", 2), 2)
    assert notes == []
    assert [q["uid"] for q in questions] == list(dict.fromkeys(row["uid"] for row in rows))
    for question in questions:
        mine = [row for row in rows if row["uid"] == question["uid"]]
        answers = [row for row in mine if row["role"] == "responder"]
        assert question["question"]["output"] == mine[0]["output"] and question["reference"] == mine[0]["reference"]
        assert [a["output"] for a in question["answers"]] == [row["output"] for row in answers]
        assert question["documents"] == (answers[0]["document_ids"] if answers else [])
        for index, answer in enumerate(question["answers"]):
            judged = [row for row in mine if row["group"] == f"{question['uid']}/{index}"]
            assert [(j["vote"], j["reward"], j["output"]) for j in answer["judgments"]] == [
                (row["verdict"], row["reward"], row["output"]) for row in judged
            ]
            assert bool(judged) == (answer["prediction"] is not None)


def test_answers_to_questions_that_nobody_asked(tmp_path):
    """A run on given questions has no rows of a questioner."""
    run = make_run(tmp_path / "run", 1)
    file = run / "rollouts" / "step_000001.jsonl"
    rows = [row for row in rollouts(run, 1) if row["role"] != "questioner"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(file, 1000, 10**6, 0, [])
    assert [q["uid"] for q in questions] == list(dict.fromkeys(row["uid"] for row in rows))
    assert {q["question"] for q in questions} == {None} and {len(q["answers"]) for q in questions} == {4}
    assert "mixed" in {q["outcome"] for q in questions}
    assert questions[0]["responder_prompt"] == rows[0]["prompt"] and questions[0]["reference"] == rows[0]["reference"]


def test_outcomes_are_those_that_the_run_counted(tmp_path):
    run = make_run(tmp_path / "run", 20)
    metrics = read_run(run, "run").metrics
    for step in range(1, 21):
        questions = read_questions(run / "rollouts" / f"step_{step:06d}.jsonl", 1000, 100, 0, [])
        counted = Counter(q["outcome"] for q in questions)
        for outcome in Outcome:
            assert counted[outcome] / len(questions) == pytest.approx(
                metrics[f"selfplay/rate/{outcome}"][step], rel=1e-4
            )


def test_files_from_before_rows_had_an_outcome_are_read(tmp_path):
    run = make_run(tmp_path / "run", 1)
    file = run / "rollouts" / "step_000001.jsonl"
    told = [q["outcome"] for q in read_questions(file, 1000, 100, 0, [])]
    file.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "outcome"}) + "\n" for row in rollouts(run, 1))
    )
    guessed = [q["outcome"] for q in read_questions(file, 1000, 100, 0, [])]
    assert guessed == ["dropped" if Outcome(outcome).dropped else outcome for outcome in told]


def test_the_sample_of_transcripts_is_spread_over_steps_and_outcomes(tmp_path):
    run = make_run(tmp_path / "run", 20)
    calls = []
    message = write_report([run], tmp_path / "page.html", 20, 300, lambda done, total: calls.append((done, total)))
    questions = embedded((tmp_path / "page.html").read_text(), "transcripts-data")
    assert sorted({q["step"] for q in questions}) == [1, 7, 14, 20] and calls == [(n, 4) for n in (1, 2, 3, 4)]
    assert len(questions) <= 20 and "transcripts of 4 of its 20 steps; --transcripts N for more" in message
    one = read_questions(run / "rollouts" / "step_000020.jsonl", 1, 300, 0, [])
    assert len(one) == 1
    everything = read_questions(run / "rollouts" / "step_000020.jsonl", 1000, 300, 0, [])
    kinds = {(q["task"], q["outcome"]) for q in everything}
    taken = read_questions(run / "rollouts" / "step_000020.jsonl", len(kinds), 300, 0, [])
    assert {(q["task"], q["outcome"]) for q in taken} == kinds


def test_long_texts_lose_their_middle(tmp_path):
    run = make_run(tmp_path / "run", 1, remark="x" * 900)
    questions = read_questions(run / "rollouts" / "step_000001.jsonl", 1000, 400, 0, [])
    row = rollouts(run, 1)[0]
    short = questions[0]["question"]["output"]
    head, left_out, tail = re.fullmatch(r"(?s)(.*)\n\[… ([\d,]+) characters left out …\]\n(.*)", short).groups()
    assert len(head + tail) == 400 and row["output"].startswith(head) and row["output"].endswith(tail)
    assert int(left_out.replace(",", "")) == len(row["output"]) - 400
    judgment = next(a for q in questions for a in q["answers"] if a["judgments"])["judgments"][0]
    assert len(judgment["output"].split("\n")[0]) == 66  # two thirds of a hundred


def test_what_the_gate_said_of_a_question_stands_with_it(simulated, tmp_path):
    file = tmp_path / "step_000001.jsonl"
    rows = [row | {"gate": 0.75} if row["role"] == "questioner" else row for row in rollouts(simulated, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {q["question"]["gate"] for q in read_questions(file, 1000, 400, 0, [])} == {0.75}
    older = [{key: value for key, value in row.items() if key != "gate"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert {q["question"]["gate"] for q in read_questions(file, 1000, 400, 0, [])} == {None}


def test_a_dump_that_cannot_be_read_is_left_out(simulated, tmp_path):
    folder = shutil.copytree(simulated, tmp_path / "run")
    (folder / "rollouts" / "step_000002.jsonl").write_text('{"uid": "2.0", "role"')
    (folder / "rollouts" / "step_000003.jsonl").write_text('{"uid": "3.0"}\n')
    message = write_report([folder], tmp_path / "report.html")
    assert "step_000002.jsonl cannot be read (ValueError: line 1 is not JSON (" in message
    assert "step_000003.jsonl cannot be read (KeyError: 'role') and is left out" in message


def test_text_of_a_model_is_data_of_the_page_and_nothing_else(simulated, tmp_path):
    folder = shutil.copytree(simulated, tmp_path / "<b onclick='x'>&{{style}}")
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(" not in page and "onerror" not in page and "<b " not in page
    assert "<title>SPELL report: &lt;b onclick=&#x27;x&#x27;&gt;&amp;{{style}}</title>" in page
    assert page.count("</script>") == 3 and page.count("<script") == 3
    assert any(HOSTILE in q["question"]["output"] for q in embedded(page, "transcripts-data"))


def test_the_page_names_no_other_place(simulated, tmp_path):
    write_report([simulated], tmp_path / "report.html", transcripts=0)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+[\w/-]*", page)) == {"https://github.com/leeoniya/uPlot"}
    assert not re.search(r"@import|url\(|\bsrc=|fetch\(|XMLHttpRequest", page)


def test_every_metric_that_is_plotted_is_logged(simulated):
    logged = read_run(simulated, "run").metrics
    tasks = ["doc_general_qa", "docmath_qa"]
    curves = [c for s in sections(tasks, logged) for p in s.panels for group in p.groups.values() for c in group]
    plotted = {metric.removeprefix("-") for curve in curves for metric in curve.metrics}
    plotted |= {row.metric for row in table(logged)}
    errors = {f"validation/{task}standard_error" for task in ("", "doc_general_qa/", "docmath_qa/")}
    assert {curve.error for curve in curves} - {None} == errors <= set(logged)
    mixture_of_experts = {"train/moe_load_imbalance", "train/moe_load_imbalance_max", "train/routing_changed"}
    of_gate = {metric for metric in plotted if metric.endswith("rate/gate_answers_reaching_reference")}
    # a checkpoint comes every fifty steps of a simulated run
    assert plotted - set(logged) - {"time/checkpoint"} == mixture_of_experts | of_gate


def test_evaluations_stand_beside_runs(simulated, tmp_path):
    """The numbers of the page are those that `spell evaluate` wrote."""
    whole = make_evaluation(tmp_path / "whole", 0.5, judge="gpt-oss-120b")
    some = make_evaluation(tmp_path / "some", 0.3, ("docmath", "hotpotqa", "mine"), samples=6)
    out = tmp_path / "report.html"
    assert write_report([simulated, whole, some], out, transcripts=0).endswith("transcripts, 2 evaluations")
    data = embedded(out.read_text(), "data")
    assert [run["name"] for run in data["runs"]] == ["hostile"]
    assert [evaluation["name"] for evaluation in data["evaluations"]] == ["whole", "some"]
    assert data["evaluation_columns"] == ["DocMath", "Frames", "LB-MQA", "LB-V2", "Avg", "hotpotqa", "mine"]
    assert "<title>SPELL report: hostile, whole, some</title>" in out.read_text()
    for folder, shown in zip((whole, some), data["evaluations"], strict=True):
        written = json.loads((folder / "scores.json").read_text())
        curves = written["columns"] | ({"Avg": written["average"]} if written["average"] else {})
        curves |= {name: written["benchmarks"][name] for name in shown["columns"] if name not in curves}
        for column, measures in shown["columns"].items():
            for measure, points in measures.items():
                expected = curves[column][measure].items()
                assert points == [[int(k[5:]), e["mean"], e["low"], e["high"]] for k, e in expected]
        for name, about in written["benchmarks"].items():
            assert shown["benchmarks"][name]["questions"] == about["questions"] == 40
            assert shown["benchmarks"][name]["score"][0] == about["score"]["pass@1"]["mean"]
            assert shown["benchmarks"][name]["subsets"].keys() == about["subsets"].keys()
    assert list(data["evaluations"][0]["columns"]) == ["DocMath", "Frames", "LB-MQA", "LB-V2", "Avg"]
    assert list(data["evaluations"][1]["columns"]) == ["DocMath", "hotpotqa", "mine"]  # LB-MQA needs all three
    assert data["evaluations"][1]["questions"] == {
        name: [[name.lower(), 40]] for name in ("DocMath", "hotpotqa", "mine")
    }
    assert len(data["evaluations"][0]["questions"]["Avg"]) == 6
    assert data["evaluations"][0]["facts"]["judge"] == "gpt-oss-120b" != data["evaluations"][1]["facts"]["judge"]


def test_a_folder_may_be_a_run_and_an_evaluation_or_an_evaluation_alone(simulated, tmp_path):
    both = shutil.copytree(simulated, tmp_path / "both")
    alone = make_evaluation(tmp_path / "alone", 0.5, ("mine",))
    shutil.copy(alone / "scores.json", both)
    out = tmp_path / "report.html"
    message = write_report([both, alone], out, transcripts=0)
    assert "1 run," in message and "2 evaluations" in message
    assert "0 runs, 0 steps" in write_report([alone], out)
    assert embedded(out.read_text(), "data")["runs"] == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ('{"settings": {}, "interval": "", "average": null, "columns": {"Other": {}}, "benchmarks": {}}', "KeyError"),
        (
            '{"settings": {}, "interval": "", "average": null, "columns": {}, "benchmarks": {"a": {"score": '
            '{"pass@1": {"mean": NaN, "low": 0, "high": 1}}, "rule": {}}}}',
            "is not an estimate",
        ),
    ],
)
def test_scores_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=f"cannot be read as the scores of an evaluation .*{message}"):
        write_report([tmp_path], tmp_path / "report.html")


def test_an_evaluation_that_has_not_ended(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="It holds an unfinished evaluation: run its command again"):
        write_report([tmp_path], tmp_path / "report.html")


def test_the_command(simulated, tmp_path, capsys):
    out = tmp_path / "pages" / "report.html"
    assert main(["report", str(simulated), "-o", str(out), "--transcripts", "3"]) == 0
    assert re.search(r"report\.html: 0\.\d MB, 1 run, 8 steps, 3 questions with transcripts", capsys.readouterr().out)
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    for words, message in (
        ([str(simulated), "--transcripts=-1"], "--transcripts is -1"),
        ([str(simulated), "--text-chars=10"], "--text-chars is 10"),
        ([str(tmp_path)], "is not the folder of a run"),
        ([str(simulated), "-o", str(tmp_path)], "is a folder. Name the file to write"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_known_before_the_transcripts_are_read(tmp_path):
    run = make_run(tmp_path / "run", 1)
    (tmp_path / "file").touch()
    read: list[int] = []
    os.mkfifo(tmp_path / "pipe")  # as a device, it must not be replaced by a file
    for out in (tmp_path / "file" / "report.html", tmp_path / ("x" * 252 + ".html"), tmp_path / "pipe"):
        with pytest.raises(UserError, match="Cannot write"):
            write_report([run], out, on_progress=lambda done, total: read.append(done))
    assert not read and (tmp_path / "pipe").is_fifo()
    write_report([run], tmp_path / "new" / "folder" / "report.html")


def test_numbers_of_the_page_are_those_of_the_log(tmp_path):
    """With every digit: a ratio just above 1 is no square wave."""
    values = [1.000044, 1.000051, 1.0000490001, 123456789.125, 2**53, 1e-300, -0.1]
    lines = [record(step, ratio=value) for step, value in enumerate(values)]
    run = data_of(write_run(tmp_path / "run", *lines, ""), tmp_path / "report.html")["runs"][0]
    assert run["metrics"]["ratio"] == values


def test_no_text_of_a_question_is_without_limit(tmp_path):
    """Not what was asked, the reference, the prediction, or the names and the number of documents."""
    run = make_run(tmp_path / "run", 1)
    file = run / "rollouts" / "step_000001.jsonl"
    long = {"prediction": "p" * 10**6, "reference": "r" * 10**6, "cluster_id": "c" * 10**6}
    rows = [row | long | {"document_ids": ["d" * 10**5] * 100} for row in rollouts(run, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([run], tmp_path / "report.html", text_chars=400)
    for question in embedded((tmp_path / "report.html").read_text(), "transcripts-data"):
        assert len(json.dumps(question)) < 400 * 100
        assert len(question["question"]["text"]) < 500 > len(question["reference"])
        assert question["question"]["documents"][50:] == ["50 more"]


def test_samples_without_a_reward_and_outcomes_of_a_later_version(tmp_path):
    run = make_run(tmp_path / "run", 1)
    file = run / "rollouts" / "step_000001.jsonl"
    rows = [row | {"reward": None, "advantage": None, "outcome": "new_kind"} for row in rollouts(run, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes: list[str] = []
    questions = read_questions(file, 1000, 400, 0, notes)
    assert notes == [] and {q["outcome"] for q in questions} == {"new_kind"}


def test_a_folder_whose_name_is_not_utf8(simulated, tmp_path):
    folder = shutil.copytree(simulated, tmp_path / os.fsdecode(b"run-\xff"))
    run = data_of(folder, tmp_path / "report.html")["runs"][0]
    assert run["name"] == "run-\\udcff" and run["steps"]


def test_places_on_the_axes(tmp_path):
    """Time at work and tokens so far; an update that was left out trained on nothing."""
    rollout = {"time/step": 10.0, "selfplay/generated_tokens": 5}
    made, left_out = ({"train/tokens_unshared": 7, "train/skipped": skipped} for skipped in (0.0, 1.0))
    updates = made, left_out, {"train/empty": 1.0}, made
    steps = [record(i + 1, **rollout, **update) for i, update in enumerate(updates)]
    steps.insert(0, record(0, **{"time/validation": 30.0}))
    run = data_of(write_run(tmp_path / "run", *steps, ""), tmp_path / "report.html")["runs"][0]
    assert run["axes"] == {"time": [30, 40, 50, 60, 70], "generated": [0, 5, 10, 15, 20], "trained": [0, 7, 7, 7, 14]}
    assert run["made"] == [None, True, False, False, True]


def test_runs_can_be_compared_only_by_the_same_questions(simulated, tmp_path):
    def key(name: str, settings: str, *lines: str) -> str | None:
        folder = write_run(tmp_path / name, *lines, "")
        (folder / "config.yaml").write_text(settings)
        return data_of(folder, tmp_path / "report.html")["runs"][0]["question_set"]

    def measured(name: str, number: float, count: int = 500) -> str:
        known = {"validation/pass@1": 0.5, "validation/question_set": number, "validation/questions": count}
        return key(name, f"validation: {{questions: {name}.jsonl, samples: 4}}", record(0, **known))

    assert measured("a", 1) == measured("elsewhere", 1) != measured("b", 2)
    assert measured("c", 1, 250) != measured("d", 1)
    # runs of earlier versions do not say what their files held: the name must do
    old = [key(f"old-{i}", f"validation: {{questions: {name}}}", record(0, a=1)) for i, name in enumerate("aab")]
    assert old[0] == old[1] != old[2]
    assert key("none", "", record(0, a=1)) is None
