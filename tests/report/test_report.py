"""The report: what it reads of run folders in any state, which transcripts it takes, and what its page may hold.

tests/report/test_report_page.py opens pages in a browser.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
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


def write_run(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def record(step: int, **metrics: float | None) -> str:
    return json.dumps({"step": step, "time": 1795290427.5 + step} | metrics)


def embedded(page: str, name: str):
    """What the page holds under an id, unpacked."""
    letters = re.search(rf'<script type="application/gzip" id="{name}">([A-Za-z0-9+/=]*)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(letters)))


def rollouts(run: Path, step: int) -> list[dict]:
    with (run / "rollouts" / f"step_{step:06d}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_columns_stand_over_the_steps(tmp_path):
    lines = record(0, b=0.5), record(1, a=1 / 3), record(2, a=None, text="x", b=1e-9)
    run = read_run(write_run(tmp_path / "run", *lines, ""), "run")
    assert run.steps == [0, 1, 2]
    assert run.metrics == {"b": [0.5, None, 1e-9], "a": [None, 0.33333, None]}
    assert (run.first_time, run.last_time) == (1795290427.5, 1795290429.5)
    assert run.notes == []


def test_the_line_that_is_being_written_is_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "run", record(1, a=1), '{"step": 2, "a":'), "run")
    assert run.steps == [1] and run.notes == []
    (tmp_path / "run" / "metrics.jsonl").write_text('{"torn\n' + record(3, a=3) + "\n[]\n" + record(4, a=4) + "\n")
    run = read_run(tmp_path / "run", "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1e999}\n\xff\xfe\n')
    assert read_run(tmp_path / "run", "run").notes == ["4 unreadable line(s) of metrics.jsonl left out"]
    assert run.steps == [3, 4] and run.notes == ["2 unreadable line(s) of metrics.jsonl left out"]


def test_what_a_resumed_run_did_again_counts(tmp_path):
    """Steps 3 to 5 were logged before the crash; the run has come back as far as step 4."""
    lines = [record(s, a=s) for s in range(6)] + [record(3, a=30), record(4, b=40)]
    run = read_run(write_run(tmp_path / "run", *lines), "run")
    assert run.steps == [0, 1, 2, 3, 4]
    assert run.metrics == {"a": [0, 1, 2, 30, None], "b": [None] * 4 + [40]}


def test_a_run_that_is_still_going_says_so(simulated, tmp_path):
    folder = shutil.copytree(simulated, tmp_path / "going")
    whole = read_run(simulated, "run")
    assert whole.notes == [] and whole.planned == STEPS
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    message = write_report([folder], tmp_path / "report.html")
    assert f"going: step 3 of {STEPS}: still going, or stopped early" in message
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
    plotted = {metric for curve in curves for metric in curve.metrics} | {row.metric for row in table(logged)}
    assert {curve.error for curve in curves} == {None, "validation/standard_error"}
    mixture_of_experts = {"train/moe_load_imbalance", "train/moe_load_imbalance_max", "train/routing_changed"}
    of_gate = {metric for metric in plotted if metric.endswith("rate/gate_answers_reaching_reference")}
    # a checkpoint comes every fifty steps of a simulated run
    assert plotted - set(logged) - {"time/checkpoint"} == mixture_of_experts | of_gate


def test_evaluations_stand_beside_runs(simulated, tmp_path):
    """The numbers of the page are those that `spell evaluate` wrote."""
    whole = make_evaluation(tmp_path / "whole", 0.5, judge="gpt-oss-120b")
    some = make_evaluation(tmp_path / "some", 0.3, ("docmath", "hotpotqa", "mine"), samples=6)
    out = tmp_path / "report.html"
    assert write_report([simulated, whole, some], out, transcripts=0).endswith("transcripts, 2 evaluation(s)")
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
    assert data["evaluations"][0]["facts"]["judge"] == "gpt-oss-120b" != data["evaluations"][1]["facts"]["judge"]


def test_a_folder_may_be_a_run_and_an_evaluation_or_an_evaluation_alone(simulated, tmp_path):
    both = shutil.copytree(simulated, tmp_path / "both")
    alone = make_evaluation(tmp_path / "alone", 0.5, ("mine",))
    shutil.copy(alone / "scores.json", both)
    out = tmp_path / "report.html"
    message = write_report([both, alone], out, transcripts=0)
    assert "1 run(s)" in message and "2 evaluation(s)" in message
    assert "0 run(s), 0 steps" in write_report([alone], out)
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
    assert re.search(
        r"report\.html: 0\.\d MB, 1 run\(s\), 8 steps, 3 questions with transcripts", capsys.readouterr().out
    )
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
