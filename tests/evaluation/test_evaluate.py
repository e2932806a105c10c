"""`spell evaluate` from end to end: with a server that counts, and with real engines and a real judge."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
import requests
from engine_fixtures import save_byte_tokenizer, save_policy
from openai_stub import serve

from spell_megatron.cli import main
from spell_megatron.errors import UserError
from spell_megatron.evaluation import openai_server
from spell_megatron.evaluation.benchmarks import BenchmarkQuestion
from spell_megatron.evaluation.generate import sample_seed
from spell_megatron.evaluation.journal import Journal
from spell_megatron.evaluation.load_benchmark import load_benchmark
from spell_megatron.evaluation.prompt_cut import cut_text
from spell_megatron.processes.folder_lock import FolderLock
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.tokenizer import PolicyTokenizer

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "examples" / "quickstart" / "heldout.jsonl"
VERIFIER = ROOT / "spell_megatron" / "selfplay" / "prompt_sets" / "compact" / "verifier.md"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(openai_server, "_RETRIES", 2)
    with serve() as stub:
        yield stub


@pytest.fixture
def mine(tmp_path) -> Path:
    """Five questions of one's own; the reference of the first is Oslo, of the others Bergen."""
    path = tmp_path / "mine.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "task": "doc_general_qa",
            "question": f"Where was meeting {i}?",
            "answer": "Oslo" if i == 0 else "Bergen",
            "documents": [f"Meeting {i} is described here. " + "Nothing else happened. " * 20],
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(tokenizer_folder, stub, mine, out, *more: object) -> list[str]:
    words = ["evaluate", "--model", tokenizer_folder, "--benchmark", f"mine={mine}", "--out", out]
    words += ["--server", stub.url, "--server-model", "policy", "--samples", "4", *more]
    return [str(word) for word in words]


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def scores(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def killed_after(count: int, words: list[str], out: Path) -> list[dict]:
    """Start a command, kill it when it has so many samples, and return those that it leaves."""
    process = subprocess.Popen([sys.executable, "-m", "spell_megatron", *words], cwd=ROOT)
    while process.poll() is None and (not (out / "samples.jsonl").exists() or len(samples(out)) < count):
        time.sleep(0.01)
    process.kill()
    process.wait()
    return samples(out)


# ---------------------------------------------------------------------------------------- a server


def test_every_sample_is_one_request_with_a_seed_of_its_own(tokenizer_folder, stub, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    out = tmp_path / "out"
    assert main(command(tokenizer_folder, stub, mine, out, "--max-output", "99")) == 0
    assert len(stub.requests) == 20
    bodies = [body for _, body, _ in stub.requests]
    assert len({body["seed"] for body in bodies}) == 20
    assert {(b["model"], b["temperature"], b["top_p"], b["max_tokens"]) for b in bodies} == {("policy", 0.7, 0.95, 99)}
    assert {(b["top_k"], b["min_p"], b["repetition_penalty"]) for b in bodies} == {(-1, 0.0, 1.0)}
    assert {(route, key) for route, _, key in stub.requests} == {("/v1/completions", "Bearer secret")}
    rows = samples(out)
    assert Counter(row["id"] for row in rows) == {f"q{i}": 4 for i in range(5)}
    assert all(row["tokens"] == 7 and row["prompt_tokens"] == len(bodies[0]["prompt"]) for row in rows)
    assert scores(out)["benchmarks"]["mine"]["score"]["pass@1"]["mean"] == pytest.approx(0.2)
    # again: nothing is asked; with more samples only what is missing; with fewer the first ones count
    assert main(command(tokenizer_folder, stub, mine, out, "--max-output", "99")) == 0
    assert len(stub.requests) == 20
    assert main(command(tokenizer_folder, stub, mine, out, "--max-output", "99", "--samples", "6")) == 0
    assert len(stub.requests) == 30 and len({body["seed"] for _, body, _ in stub.requests}) == 30
    assert main(command(tokenizer_folder, stub, mine, out, "--max-output", "99", "--samples", "2")) == 0
    assert len(stub.requests) == 30 and scores(out)["benchmarks"]["mine"]["samples"] == 2


def test_seeds_of_a_whole_evaluation_differ():
    made = {
        sample_seed(seed, BenchmarkQuestion(str(i), "doc_mc", "", "", (), benchmark), index)
        for seed in (0, 1)
        for benchmark in ("docmath", "frames")
        for i in range(800)
        for index in range(8)
    }
    assert len(made) == 2 * 2 * 800 * 8 and max(made) < 2**53


@pytest.mark.parametrize("limit", [2000, 300, 301])
def test_prompts_are_cut_in_the_middle_by_tokens(limit, tokenizer_folder, stub, mine, tmp_path):
    out = tmp_path / "out"
    assert main(command(tokenizer_folder, stub, mine, out, "--samples", "1", "--max-input", str(limit))) == 0
    tokenizer, prompts = PolicyTokenizer(tokenizer_folder), PromptSet.load("full")
    whole = {
        q.id: list(tokenizer.prompt_ids(prompts.responder(q.task, q.question, q.documents)))
        for q in load_benchmark("mine", mine)
    }
    cut = {
        key: ids if len(ids) <= limit else ids[: limit // 2] + ids[-(limit - limit // 2) :]
        for key, ids in whole.items()
    }
    sent = sorted(body["prompt"] for _, body, _ in stub.requests)
    assert sent == sorted(cut.values()) and max(map(len, sent)) == min(limit, max(map(len, whole.values())))
    assert all(
        row["prompt_cut"] == (limit < 2000) and row["prompt_tokens"] == len(cut[row["id"]]) for row in samples(out)
    )
    assert scores(out)["benchmarks"]["mine"]["prompts_cut"] == (limit < 2000)


def test_chat_sends_text_within_the_limit(tokenizer_folder, stub, mine, tmp_path):
    out = tmp_path / "out"
    assert main(command(tokenizer_folder, stub, mine, out, "--chat", "--max-input", "301", "--samples", "1")) == 0
    assert {route for route, _, _ in stub.requests} == {"/v1/chat/completions"}
    texts = [body["messages"][0]["content"] for _, body, _ in stub.requests]
    assert all(len(text.encode()) == 301 and text.startswith("Read the documents") for text in texts)
    assert all(text.endswith("in the place of X:\n\nThe correct answer is X") for text in texts)


def test_text_is_cut_within_its_limit_where_tokens_are_words():
    tokenizer = PolicyTokenizer(ROOT / "examples" / "quickstart" / "policy")
    text = "What is the seat of Hanlutek? The seat of Hanlutek is Pehalburg. " * 30
    whole = tokenizer.count(text)
    for limit in (whole, whole - 1, 101, 10, 3):
        short, count, cut = cut_text(tokenizer, text, limit)
        assert count == tokenizer.count(short) <= limit and cut == (limit < whole)
        assert count >= limit - 4  # hardly more is left out than the limit demands


def test_what_was_paid_is_kept_when_the_server_fails(tokenizer_folder, stub, mine, tmp_path, capsys):
    out = tmp_path / "out"
    served = 0

    def answer(body: dict) -> tuple[int, str]:
        nonlocal served
        served += 1
        return (200, "The correct answer is Oslo") if served <= 7 else (503, "overloaded")

    stub.answer = answer
    words = command(tokenizer_folder, stub, mine, out, "--rollout.concurrency=2")
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "HTTP 503" in message and "overloaded" in message and "what is done stays done" in message
    assert stub.busiest <= 2 and len(samples(out)) == 7
    before, paid = (out / "samples.jsonl").read_text(), {row["seed"] for row in samples(out)}
    stub.requests.clear()
    stub.answer = lambda body: (200, "The correct answer is Bergen")
    assert main(words) == 0
    assert (out / "samples.jsonl").read_text().startswith(before)
    assert len(stub.requests) == 13 and not paid & {body["seed"] for _, body, _ in stub.requests}


def test_a_hiccup_is_tried_again(tokenizer_folder, stub, mine, tmp_path):
    faults = iter([(429, "slow down"), (500, "oops")])
    stub.answer = lambda body: next(faults, (200, "The correct answer is Oslo"))
    assert main(command(tokenizer_folder, stub, mine, tmp_path / "out", "--rollout.concurrency=1")) == 0
    assert len(stub.requests) == 22


@pytest.mark.parametrize(
    "status, message",
    [(404, "refuses a request for the model 'policy': HTTP 404"), (401, "refuses the key"), (200, None)],
)
def test_faults_of_the_server_are_told(status, message, tokenizer_folder, stub, mine, tmp_path, capsys):
    stub.answer = lambda body: (status, "no such model")
    words = command(tokenizer_folder, stub, mine, tmp_path / "out")
    if message is None:  # nobody is there
        words[words.index("--server") + 1] = "http://127.0.0.1:1/v1"
        message = "cannot be used"
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_server_that_says_nothing_or_something_else(chat, tokenizer_folder, stub, mine, tmp_path, capsys):
    stub.answer = lambda body: (200, None)  # as servers do where all tokens were reasoning
    assert main(command(tokenizer_folder, stub, mine, tmp_path / "out", *chat)) == 0
    assert {row["text"] for row in samples(tmp_path / "out")} == {""}
    assert scores(tmp_path / "out")["benchmarks"]["mine"]["answers_without_statement"] == 1
    stub.answer = lambda body: (200, [{"type": "text", "text": "Oslo"}])
    assert main(command(tokenizer_folder, stub, mine, tmp_path / "other", *chat)) == 2
    assert "does not answer as OpenAI's API does" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- judge


def judging(stub, tokenizer_folder, mine, out, *more) -> list[str]:
    return command(
        tokenizer_folder,
        stub,
        mine,
        out,
        "--judge",
        stub.url,
        "--judge-model",
        "gpt-oss-120b",
        "--judge-key-env",
        "JUDGE_KEY",
        *more,
    )


def test_the_judge_decides_what_the_rule_calls_wrong(tokenizer_folder, stub, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "of the judge")
    out = tmp_path / "out"
    verdicts = {1: "Explanation: both. Decision: [[YES]]", 2: "Decision: [[NO]]", 3: "I cannot say", 4: "[[YES]]"}

    def answer(body: dict) -> tuple[int, str]:
        if body["model"] == "policy":
            return 200, "Reasoning.\nThe correct answer is Oslo"
        prompt = body["messages"][0]["content"]
        return 200, next(text for i, text in verdicts.items() if f"meeting {i}?" in prompt)

    stub.answer = answer
    assert main(judging(stub, tokenizer_folder, mine, out)) == 0
    judged = [(body, key) for _, body, key in stub.requests if body["model"] == "gpt-oss-120b"]
    # 16 answers are wrong by rule; the 4 to a question are the same, and judged once
    assert len(judged) == 4
    assert {(b["temperature"], b["top_p"], b["max_tokens"], key) for b, key in judged} == {
        (0.0, 1.0, 8192, "Bearer of the judge")
    }
    assert {(b["top_k"], b["min_p"], b["repetition_penalty"]) for b, _ in judged} == {(-1, 0.0, 1.0)}
    prompt = judged[0][0]["messages"][0]["content"]
    assert "\nOslo\n" in prompt and "\nBergen\n" in prompt and "Reasoning" not in prompt
    about = scores(out)["benchmarks"]["mine"]
    assert (about["judged"], about["judged_yes"], about["judged_unparsable"]) == (16, 8, 4)
    assert about["rule"]["pass@1"]["mean"] == pytest.approx(0.2)
    assert about["score"]["pass@1"]["mean"] == pytest.approx(0.6)  # question 0 by rule, 1 and 4 by the judge
    assert "gpt-oss-120b" in (out / "scores.md").read_text()
    assert main(judging(stub, tokenizer_folder, mine, out)) == 0
    assert len(stub.requests) == 24  # nothing was asked again
    assert main(judging(stub, tokenizer_folder, mine, out, "--limit", "4")) == 0 and len(stub.requests) == 24
    verdicts[0] = "[[YES]]"
    assert main(judging(stub, tokenizer_folder, mine, out, "--judge-all")) == 0
    assert len(stub.requests) == 25 and scores(out)["benchmarks"]["mine"]["judged"] == 20


def test_a_judge_that_cannot_be_reached_costs_no_answers(tokenizer_folder, stub, mine, tmp_path, capsys):
    out = tmp_path / "out"
    words = judging(stub, tokenizer_folder, mine, out)
    words[words.index("--judge") + 1] = "http://127.0.0.1:1/v1"
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "The judge (--judge) at http://127.0.0.1:1/v1 cannot be used" in error and "run the same command" in error
    assert len(samples(out)) == 20


# ------------------------------------------------------------------------------------------ resume


def test_two_evaluations_in_one_folder_are_kept_apart(tokenizer_folder, stub, mine, tmp_path, capsys):
    out = tmp_path / "out"
    with FolderLock(out, "`spell evaluate`", ""):  # another, on whatever machine
        assert main(command(tokenizer_folder, stub, mine, out)) == 2
    said = capsys.readouterr().err
    assert "is in use by `spell evaluate`, process" in said and "another --out" in said and not stub.requests
    assert main(command(tokenizer_folder, stub, mine, out)) == 0


def test_nothing_is_paid_twice_after_a_kill(tokenizer_folder, mine, tmp_path):
    out = tmp_path / "out"
    with serve() as stub:
        stub.delay = 0.1
        words = command(tokenizer_folder, stub, mine, out, "--samples", "12", "--rollout.concurrency=3")
        kept = killed_after(10, words, out)
        assert 10 <= len(kept) < 60
        with (out / "samples.jsonl").open("a") as file:
            file.write('{"benchmark": "mine", "id": "q0", "sam')  # as a machine that fails may leave it
        stub.delay = 0.0
        assert main(words) == 0
        rows = samples(out)
        assert rows[: len(kept)] == kept and len(rows) == 60
        assert len({(row["id"], row["sample"]) for row in rows}) == len({row["seed"] for row in rows}) == 60
        asked = Counter(body["seed"] for _, body, _ in stub.requests)
        assert sum(asked.values()) <= 60 + 3  # twice only what was under way at the kill
        assert all(asked[row["seed"]] == 1 for row in kept)


def test_samples_of_other_settings_or_questions_are_not_mixed(tokenizer_folder, stub, mine, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(tokenizer_folder, stub, mine, out)) == 0
    assert main(command(tokenizer_folder, stub, mine, out, "--max-input", "100")) == 2
    assert "max_input was 16384 and is 100" in capsys.readouterr().err
    mine.write_text(mine.read_text().replace("Where was meeting 3", "Where is meeting 3"))
    assert main(command(tokenizer_folder, stub, mine, out)) == 2
    assert "answers to question q3 of mine in another wording" in capsys.readouterr().err


def test_a_journal_has_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for i in range(3):
            journal.append({"i": i, "text": "ä\u2028\n" * 50_000})
    whole = path.read_bytes()
    for torn in (whole[:-1], whole + b'{"i": 3', whole[: len(whole) // 2]):
        path.write_bytes(torn)
        with Journal(path) as journal:
            rows = list(journal.rows())
            assert [row["i"] for row in rows] == list(range(torn.count(b"\n")))
            journal.append({"i": "new"})
            assert list(journal.rows())[-1] == {"i": "new"}
    path.write_bytes(b"{}\n[1]\n{}\n")
    with Journal(path) as journal, pytest.raises(UserError, match="Line 2 of .* is damaged: it is not a JSON object"):
        list(journal.rows())
    path.write_bytes(b"{}\nno json\n{}\n")
    with Journal(path) as journal, pytest.raises(UserError, match="Line 2 of .* is damaged"):
        list(journal.rows())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--judge", "http://x"], "--judge and --judge-model belong together"),
        (["--benchmark", "mine=other"], "is given twice"),
        (["--benchmark", "paper=folder"], "`paper` takes no path"),
        (["--benchmark", "unknown"], "There is no benchmark 'unknown'"),
        (["--judge-prompt", "nowhere.md"], "cannot be read"),
        (["--judge-prompt", __file__], "must have the placeholders"),
        (["--rollout.concurency=3"], "rollout.concurency"),
        (["--rollout.sampling.temperature=9"], "rollout.sampling.temperature"),
        (["--temperature", "0.6"], "temperature: unknown key. Did you mean rollout.sampling.temperature?"),
        (["--training.optimizer.rate=1"], "training.optimizer.rate: unknown key"),
        (["--selfplay.prompts=none"], "prompt set"),
    ],
)
def test_mistakes_are_told(words, message, tokenizer_folder, stub, mine, tmp_path, capsys):
    assert main(command(tokenizer_folder, stub, mine, tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not stub.requests


def test_a_model_is_needed(mine, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tmp_path), "--benchmark", f"m={mine}", "--out", str(tmp_path / "o")]) == 2
    assert "There is no model in" in capsys.readouterr().err


def test_a_model_that_vllm_would_compute_otherwise_is_refused(mine, tmp_path, capsys):
    policy = shutil.copytree(ROOT / "examples" / "quickstart" / "policy", tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    (policy / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn, "attention_bias": True}))
    words = ["evaluate", "--model", policy, "--benchmark", f"m={mine}", "--out", tmp_path / "out", "--max-input", 700]
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "2 faults in the evaluation" in told and "o_proj.bias" in told and "128 positions (rope scaling)" in told


def test_a_model_that_vllm_cannot_compute_on_cpus_is_refused(mine, tmp_path, capsys):
    save_policy("qwen3_5_text", tmp_path / "policy", seed=0)
    words = ("--model", tmp_path / "policy", "--run.device=cpu", "--model.dtype=float32")
    command = ["evaluate", *words, "--benchmark", f"m={mine}", "--out", tmp_path / "out", "--max-input", 700]
    assert main([str(word) for word in command]) == 2
    told = capsys.readouterr().err
    assert "linear-attention layers (gated delta nets) only in bfloat16" in told


def evaluate_quickstart(mine: Path, out: Path, *words: object) -> int:
    policy = ROOT / "examples" / "quickstart" / "policy"
    common = ("evaluate", "--model", policy, "--benchmark", f"m={mine}", "--out", out)
    return main([str(word) for word in (*common, *words)])


def test_limits_beyond_the_models_positions_are_told_before_anything_is_written(mine, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate_quickstart(mine, out) == 2
    told = capsys.readouterr().err
    assert "--max-input: the longest prompt and response together, 20480 tokens" in told
    assert "Lower --max-input or --max-output by" in told
    assert not (out / "evaluation.json").exists()


def test_of_a_family_that_cannot_be_trained_the_positions_count_too(mine, tmp_path, capsys):
    policy = shutil.copytree(ROOT / "examples" / "quickstart" / "policy", tmp_path / "policy")
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "max_position_embeddings": 512}
    (policy / "config.json").write_text(json.dumps(config))
    words = ["evaluate", "--model", policy, "--benchmark", f"m={mine}", "--out", tmp_path / "out", "--max-input", 700]
    assert main([str(word) for word in words]) == 2
    assert "more than the model's 512 positions" in capsys.readouterr().err


def test_a_corrected_command_is_not_held_to_one_that_answered_nothing(tokenizer_folder, stub, mine, tmp_path, capsys):
    right, stub.answer = stub.answer, lambda body: (400, "the prompt is too long")
    out = tmp_path / "out"
    assert main(command(tokenizer_folder, stub, mine, out)) == 2
    stub.answer = right
    assert main(command(tokenizer_folder, stub, mine, out, "--max-input", "100")) == 0, capsys.readouterr().err
    assert json.loads((out / "evaluation.json").read_text())["max_input"] == 100


def test_a_step_of_a_run_is_a_model(tokenizer_folder, stub, mine, tmp_path):
    step = tmp_path / "checkpoints" / "step_000012"
    (step / "hf").mkdir(parents=True)
    for file in [*tokenizer_folder.iterdir(), ROOT / "examples" / "quickstart" / "policy" / "config.json"]:
        (step / "hf" / file.name).write_bytes(file.read_bytes())
    assert main(command(step, stub, mine, tmp_path / "out")) == 0
    assert len(stub.requests) == 20


def test_the_day_of_the_prompts_is_that_of_the_run_or_of_the_evaluations_beginning(
    tokenizer_folder, stub, mine, tmp_path
):
    step = tmp_path / "checkpoints" / "step_000012"
    shutil.copytree(tokenizer_folder, step / "hf")
    shutil.copyfile(ROOT / "examples" / "quickstart" / "policy" / "config.json", step / "hf" / "config.json")
    (step / "hf" / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') + messages[0].content }}")
    (step / "config.json").write_text('{"model": {"prompt_date": "2024-07-26"}}')

    ours = list(PolicyTokenizer(step / "hf", date(2024, 7, 26)).prompt_ids(""))
    assert main(command(step, stub, mine, tmp_path / "of_run")) == 0
    assert all(body["prompt"][:11] == ours for _, body, _ in stub.requests)
    (step / "config.json").unlink()  # a model that is of no run
    out = tmp_path / "of_model"
    before, status, after = date.today(), main(command(step, stub, mine, out, "--samples", "1")), date.today()
    settings = json.loads((out / "evaluation.json").read_text())
    assert status == 0 and settings["prompt_date"] in (str(before), str(after))
    (out / "evaluation.json").write_text(json.dumps(settings | {"prompt_date": "2024-07-26"}))
    stub.requests.clear()
    assert main(command(step, stub, mine, out, "--samples", "2")) == 0  # on another day
    assert len(stub.requests) == 5 and all(body["prompt"][:11] == ours for _, body, _ in stub.requests)
    (out / "evaluation.json").write_text(json.dumps(settings | {"prompt_date": 5}))
    assert main(command(step, stub, mine, out, "--samples", "2")) == 2
    del settings["prompt_date"]  # as earlier versions wrote it
    (out / "evaluation.json").write_text(json.dumps(settings))
    assert main(command(step, stub, mine, out, "--samples", "3")) == 0


# --------------------------------------------------------------------------- answers from elsewhere


@pytest.fixture
def answers(tmp_path):
    """answers(lines, *words): exit status of scoring these to hotpotqa, with the references yes and a bridge."""

    def score(lines: list[dict | str], *words: str) -> int:
        path = tmp_path / "answers.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        source = ROOT / "tests" / "data" / "benchmarks" / "longbench"
        more = ["--benchmark", f"hotpotqa={source}", "--out", str(tmp_path / "out"), *words]
        return main(["evaluate", "--answers", str(path), *more])

    return score


FIRST, SECOND = (f"hotpotqa{i:040x}" for i in (1, 2))


def test_answers_from_elsewhere_are_scored(answers, tmp_path):
    right, wrong = {"text": "The correct answer is Yes."}, {"text": "The correct answer is no"}
    bridge = {"id": SECOND, "text": "<think>Hm.</think>The correct answer is the Sorrel Bridge"}
    bridge["benchmark"] = "hotpotqa"
    lines = [{"id": FIRST} | right, bridge, {"id": FIRST} | wrong, bridge | {"cut": True}]
    assert answers(lines) == 0
    about = scores(tmp_path / "out")["benchmarks"]["hotpotqa"]
    assert (about["questions"], about["samples"]) == (2, 2)
    assert about["score"]["pass@1"]["mean"] == 0.5 and about["score"]["pass@2"]["mean"] == 1
    assert about["answers_cut"] == 0.25


def test_answers_of_a_windows_machine_and_in_any_script(answers, tmp_path):
    lines = [{"id": FIRST, "text": "La réponse: the answer is Yes\u2028東"}, {"id": SECOND, "text": ""}]
    assert answers(["\ufeff" + json.dumps(lines[0], ensure_ascii=False) + "\r", "\r", lines[1]]) == 0
    about = scores(tmp_path / "out")["benchmarks"]["hotpotqa"]
    assert about["score"]["pass@1"]["mean"] == 0.5 and about["answers_without_statement"] == 0.5


def test_answers_from_elsewhere_are_judged(answers, tmp_path, stub):
    stub.answer = lambda body: (200, "[[YES]]")
    lines = [{"id": key, "text": "The correct answer is indeed"} for key in (FIRST, SECOND)]
    assert answers(lines, "--judge", stub.url, "--judge-model", "judge") == 0
    assert scores(tmp_path / "out")["benchmarks"]["hotpotqa"]["score"]["pass@1"]["mean"] == 1
    assert len(stub.requests) == 2


def test_any_alias_of_a_reference_counts_if_it_is_asked_for(tmp_path, stub):
    row = {"id": 1, "task": "doc_general_qa", "question": "Who?", "answer": "Ada Lovelace", "documents": ["Text."]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row | {"aliases": ["Ada King", "A. Byron"]}) + "\n")
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"id": 1, "text": f"The correct answer is {name}"}) + "\n" for name in ("Ada King", "Eve"))
    )
    words = ["evaluate", "--answers", tmp_path / "answers.jsonl", "--benchmark", f"mine={tmp_path / 'mine.jsonl'}"]
    judge = ["--judge", stub.url, "--judge-model", "judge"]
    stub.answer = lambda body: (200, "[[NO]]")
    for more, right in (([], 0), (["--aliases"], 0.5)):
        stub.requests.clear()
        assert main([*map(str, words), "--out", str(tmp_path / f"out{right}"), *judge, *more]) == 0
        numbers = scores(tmp_path / f"out{right}")
        assert numbers["benchmarks"]["mine"]["score"]["pass@1"]["mean"] == right
        shown = [body["messages"][0]["content"] for _, body, _ in stub.requests]
        assert all(("\nAda Lovelace (or: Ada King; A. Byron)\n" in prompt) == bool(more) for prompt in shown)
        assert len(shown) == (1 if more else 2) and numbers["settings"].get("aliases", False) == bool(more)


def test_a_server_that_knows_no_top_k_is_asked_without(tokenizer_folder, stub, mine, tmp_path):
    def strict(body: dict) -> tuple[int, str]:
        if "top_k" in body:
            return 400, "Unrecognized request argument supplied: top_k"
        return 200, "The correct answer is Oslo"

    stub.answer = strict
    assert main(command(tokenizer_folder, stub, mine, tmp_path / "out")) == 0
    answered = [body for _, body, _ in stub.requests if "top_k" not in body]
    assert len(answered) == 20 and not {"min_p", "repetition_penalty"} & answered[0].keys()


@pytest.mark.parametrize(
    "lines, message",
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "line 1 is not a JSON object"),
        ([{"id": FIRST}], "line 1 has no 'text'"),
        ([{"id": "other", "text": "x"}], "there is no question 'other' of 'hotpotqa'"),
        ([{"id": FIRST, "text": 1}], "text must be a string"),
        ([{"id": FIRST, "text": "x"}], f"0 answers to question '{SECOND}' of 'hotpotqa', and 1 to others"),
        ([], "0 answers to question"),
    ],
)
def test_faulty_answers_are_told(lines, message, answers, capsys):
    assert answers(lines) == 2
    assert message in capsys.readouterr().err


def test_a_model_or_answers(answers, capsys):
    assert answers([], "--model", "somewhere") == 2
    assert "--model FOLDER, or answers to score" in capsys.readouterr().err


# --------------------------------------------------------------------------------- engines and judge


@pytest.mark.slow
def test_engines_answer_and_a_real_model_judges(engines_for, tmp_path, monkeypatch):
    """The quick start's policy in vLLM answers held-out questions, is killed at it, and judges by OpenAI's API."""
    engines = engines_for("quickstart", extra_args=["--no-skip-tokenizer-init"])  # chat needs the tokenizer
    monkeypatch.setenv("SPELL_API_KEY", engines.api_key)
    out, url = tmp_path / "out", engines.urls[0]
    words = ["evaluate", "--model", "examples/quickstart/policy", "--config", "examples/quickstart.yaml"]
    words += ["--benchmark", f"heldout={HELD_OUT}", "--limit", "40", "--samples", "4", "--out", str(out)]
    words += ["--max-input", "700", "--max-output", "48", f"--rollout.urls=[{url}]", "--rollout.concurrency=8"]
    kept = killed_after(20, words, out)
    assert 20 <= len(kept) < 160
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    rows = samples(out)
    assert rows[: len(kept)] == kept and len({row["seed"] for row in rows}) == len(rows) == 160
    assert len({row["text"] for row in rows if row["id"] == rows[0]["id"]}) > 1  # B26: the samples differ

    judged = [*words, "--judge", f"{url}/v1", "--judge-model", "policy", "--judge-key-env", "SPELL_API_KEY"]
    judged += ["--judge-prompt", str(VERIFIER), "--judge-tokens", "6"]
    assert main(judged) == 0
    about = scores(out)["benchmarks"]["heldout"]
    journal = [json.loads(line) for line in (out / "judgments.jsonl").read_text().splitlines()]
    # The policy was taught to compare two answers. Of wrong ones it refuses most, in a form that can be read.
    assert samples(out) == rows and about["judged"] > 20
    assert about["judged_unparsable"] <= 0.1 * about["judged"]
    assert about["judged_yes"] <= 0.3 * about["judged"]
    assert about["score"]["pass@1"]["mean"] >= about["rule"]["pass@1"]["mean"] > 0.2
    # What the rule calls right, it accepts mostly: it judges, and does not always refuse.
    assert main([*judged, "--judge-all"]) == 0
    everything = scores(out)["benchmarks"]["heldout"]
    right = round(everything["rule"]["pass@1"]["mean"] * 160)
    assert everything["judged_yes"] - about["judged_yes"] >= 0.7 * right
    assert everything["judged"] == about["judged"] + right
    now = [json.loads(line) for line in (out / "judgments.jsonl").read_text().splitlines()]
    assert now[: len(journal)] == journal and len({row["key"] for row in now}) == len(now)


@pytest.mark.slow
def test_a_vllm_server_counts_the_tokens_that_were_meant(engines_for, tmp_path, monkeypatch):
    """Token ids sent to /completions are the prompt, exactly: nothing is tokenised or begun a second time."""
    engines = engines_for("quickstart", extra_args=["--no-skip-tokenizer-init"])
    monkeypatch.setenv("OPENAI_API_KEY", engines.api_key)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    words = ["evaluate", "--model", "examples/quickstart/policy", "--config", "examples/quickstart.yaml"]
    words += ["--benchmark", f"heldout={HELD_OUT}", "--limit", "3", "--samples", "2", "--out", str(out)]
    words += ["--max-input", "101", "--max-output", "16", "--server", engines.urls[0], "--server-model", "policy"]
    assert main(words) == 0
    rows = samples(out)
    assert len(rows) == 6 and all(row["prompt_cut"] and row["prompt_tokens"] == 101 for row in rows)
    assert all(0 < row["tokens"] <= 16 for row in rows)
    tokenizer, prompts = PolicyTokenizer(ROOT / "examples/quickstart/policy"), PromptSet.load("compact")
    question = load_benchmark("heldout", HELD_OUT, 1)[0]
    ids = list(tokenizer.prompt_ids(prompts.responder(question.task, question.question, question.documents)))
    body = {"model": "policy", "prompt": ids[:50] + ids[-51:], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {engines.api_key}"}
    answer = requests.post(f"{engines.urls[0]}/v1/completions", json=body, headers=headers, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == 101


@pytest.mark.parametrize("output", ["", "scores.json", "judgments.jsonl", "pass_at_k.svg"])
def test_an_output_that_cannot_be_written_is_known_before_anything_is_generated(
    tmp_path, tokenizer_folder, mine, stub, capsys, output
):
    out = tmp_path / "out"
    if output:
        (out / output).mkdir(parents=True)
    else:
        out.touch()
    words = ["--model", tokenizer_folder, "--server", stub.url, "--server-model", "stub", "--out", out]
    assert main([str(word) for word in ("evaluate", "--benchmark", f"mine={mine}", *words)]) == 2
    assert f"Cannot write {out / output}: " in capsys.readouterr().err
    assert not stub.requests
