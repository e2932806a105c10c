"""Rule checks, tasks and rewards of the user's own: found by name, asked in a step, and told about when they fail."""

import itertools
import sys
import textwrap
from pathlib import Path

import pytest
from scripted import ScriptedPolicy, make_selfplay, roll, rows_of, summary

from spell_megatron.config.faults import Fault
from spell_megatron.config.reading import load_config, read_config
from spell_megatron.config.selfplay_sections import SelfPlayConfig
from spell_megatron.errors import UserError
from spell_megatron.jobs.paths import missing_files, place
from spell_megatron.jobs.site import Site
from spell_megatron.preflight.findings import Findings
from spell_megatron.preflight.own_code import check_own_code, try_own_code
from spell_megatron.rollout.client import Completion
from spell_megatron.selfplay.prompts import PromptSet
from spell_megatron.selfplay.tasks import Tasks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "extend"
_names = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source) -> the name of a new module in tmp_path."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        name = f"own_{next(_names)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return write


@pytest.fixture
def faults(tmp_path):
    """faults(**settings of selfplay) -> what preflight finds wrong, one text each."""

    def check(**settings) -> list[str]:
        said = try_own_code(SelfPlayConfig(**{"code": tmp_path} | settings))
        return [str(Fault.of(*fault)) for fault in said["faults"]]

    return check


# The example


class Reader:
    """A policy for the example's prompts: asks for a name, and answers with it, or now and then in small letters."""

    async def generate(self, prompt_ids, *, n, seed, max_tokens, affinity, prompt_routing=True):
        prompt = bytes(prompt_ids).decode()
        if "<write>" in prompt:
            text = f'{{"question": "Who is {seed}?", "answer": "Ada Lovelace"}}'
        else:
            known = "Document" in prompt and seed % 2
            text = f"The correct answer is {'Ada Lovelace' if known else 'ada lovelace'}."
        ids = list(text.encode())
        return [Completion(ids, [-0.5] * len(ids), "stop", "1", None)] * n


def test_the_example_plays(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    play = load_config([ROOT / "examples/quickstart.yaml", EXAMPLE / "extend.yaml"]).selfplay
    own_prompts = check_own_code(found := Findings(), play)
    assert own_prompts == Tasks(play).own_prompts and not found.faults
    prompts = PromptSet.load("compact", own=own_prompts)
    settings = play.model_dump(include={"code", "rule", "own_tasks"}) | {
        "tasks": {"names": 1.0},
        "questioner": {"reward": play.questioner.reward},
        "verifier": {"enabled": False},
    }
    rollout = roll(make_selfplay(prompts, groups=5, **settings), Reader())
    answers = rows_of(rollout.batch, "responder")
    assert len(answers) == 20 and {row.task for row in answers} == {"names"}
    for row in answers:
        assert row.rule_score == (row.prediction == "Ada Lovelace")  # the built-in rule ignores capitals
    means = [sum(r.reward for r in answers if r.uid == q.uid) / 4 for q in rows_of(rollout.batch, "questioner")]
    rewards = [question.reward for question in rows_of(rollout.batch, "questioner")]
    assert rewards == [1 - 2 * abs(mean - 0.5) if 0 < mean < 1 else 0 for mean in means] and set(rewards) > {1.0}
    assert rollout.metrics["selfplay/names/rule_score"] > 0


# What they decide


def test_a_rule_decides_wherever_the_built_in_one_does(prompts, module, tmp_path):
    name = module("""
        asked = []
        def score(task, prediction, reference):
            asked.append(task)
            return prediction == reference == "42" or task == "doc_mc" and prediction == reference
        """)
    plain = roll(make_selfplay(prompts, gate={"enabled": True}), ScriptedPolicy())
    own = roll(make_selfplay(prompts, gate={"enabled": True}, code=tmp_path, rule=f"{name}:score"), ScriptedPolicy())
    assert set(sys.modules[name].asked) == {"docmath_qa", "doc_general_qa", "doc_mc"}
    assert summary(own) == summary(plain)
    never = module("def score(task, prediction, reference): return False")
    wrong = roll(make_selfplay(prompts, code=tmp_path, rule=f"{never}:score", max_rounds=1), ScriptedPolicy())
    assert not any(row.rule_score for row in wrong.samples)
    assert wrong.metrics["selfplay/rate/no_context_right"] == 0 < plain.metrics["selfplay/rate/no_context_right"]


def test_a_function_that_fails_on_one_input_costs_its_cluster(prompts, module, tmp_path, caplog):
    name = module("""
        def score(task, prediction, reference):
            if task == "doc_mc" and prediction == "A":
                raise ZeroDivisionError("no A here")
            return prediction == reference
        """)
    rollout = roll(make_selfplay(prompts, groups=12, code=tmp_path, rule=f"{name}:score"), ScriptedPolicy())
    assert rollout.metrics["selfplay/mixed_groups"] == 12 and rollout.metrics["selfplay/rate/error"] > 0
    assert f"{name}:score('doc_mc', 'A', 'B'), of selfplay.rule, raised ZeroDivisionError: no A here" in caplog.text


def test_what_models_write_names_no_code(prompts, module, tmp_path):
    """The name of a module in a question, its answer or its task is text like any other."""
    name = module("raise SystemExit('imported')")
    rule = module("def score(task, prediction, reference): return True")
    tasks = Tasks(SelfPlayConfig(code=tmp_path, rule=f"{rule}:score"))
    text = f'{{"question": "{name}:score", "answer": "{name}:score", "task": "{name}:score"}}'
    question = tasks.question("doc_general_qa", text, False, len, 40)
    assert tasks.answer("doc_general_qa", f"The answer is {name}:score.", False) == f"{name}:score"
    assert question.reference == f"{name}:score" and name not in sys.modules


# Faults


SOURCE = """
    from spell_megatron.selfplay.tasks import Task
    number = 3
    def score(task, prediction, reference): return True
    def two(prediction, reference): return True
    def half(task, prediction, reference): return 0.5
    def ends(task, prediction, reference): exit()
    def raises(task, prediction, reference): raise KeyError(task)
    async def later(task, prediction, reference): return True
    def reward(mean, question, reference): return mean
    def large(mean, question, reference): return 1 + mean
    def nothing(mean, question, reference): return float("nan")
    def missing(mean, question, reference): pass
    def question(record): return record["question"], record["answer"]
    def answer(response): return 3
    task = Task(prompts="prompts", question=lambda record: None, answer=answer, score=two)
    fragile = Task(prompts="prompts", question=question, answer=str, score=two)
    """


@pytest.mark.parametrize(
    ("setting", "name", "message"),
    [
        ("rule", "", "selfplay.rule is ''. It must be MODULE:"),
        ("rule", "NAME", "selfplay.rule is 'NAME'. It must be MODULE:"),
        ("rule", "NAME:sore", "no sore, which selfplay.rule names. Did you mean score?"),
        ("rule", "NAME:number", "NAME:number is not a function but 3. selfplay.rule needs a function of (task, predi"),
        ("rule", "NAME:two", "NAME:two takes (prediction, reference), but selfplay.rule calls it with (t"),
        ("rule", "NAME:half", "NAME:half('docmath_qa', '42', '42'), of selfplay.rule, returned 0.5. It must return Tr"),
        ("rule", "NAME:raises", "raised KeyError: 'docmath_qa' (NAME.py, line 8). Correct the function"),
        ("rule", "NAME:ends", "of selfplay.rule, raised SystemExit"),
        ("rule", "NAME:later", "It must return True or False."),
        ("reward", "NAME:large", "'Ada Lovelace'), of selfplay.questioner.reward, returned 1.125. It must"),
        ("reward", "NAME:nothing", "returned nan. It must return a number from 0 to 1."),
        ("reward", "NAME:missing", "returned None. It must return a number from 0 to 1."),
        ("task", "NAME:score", "is of type function. It must be a spell_megatron.selfplay.tasks.Task"),
        ("task", "NAME:task", "NAME:task.answer('The answer is Ada Lovelace.'), of selfplay.own_tasks.mine, returned"),
        ("task", "NAME:fragile", "NAME:fragile.question({}), of selfplay.own_tasks.mine, raised KeyError: 'question'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_function_is_a_fault_of_its_setting(module, faults, setting, name, message):
    own = module(SOURCE)
    named = name.replace("NAME", own)
    settings = {"rule": named} if setting == "rule" else {}
    settings |= {"questioner": {"reward": named}} if setting == "reward" else {}
    settings |= {"own_tasks": {"mine": named}} if setting == "task" else {}
    (fault,) = faults(**settings)
    assert message in fault.replace(own, "NAME")
    assert fault.startswith(
        f"selfplay.{ {'reward': 'questioner.reward', 'task': 'own_tasks.mine'}.get(setting, setting) }"
    )


def test_what_is_wrong_with_a_module_is_a_fault_of_its_setting(module, faults, tmp_path):
    assert (
        "There is no module nowhere, which selfplay.rule names. It is neither installed nor in"
        in faults(rule="nowhere.rules:score")[0]
    )
    remedy = "Install it, or set selfplay.code to the folder that holds nowhere."
    assert remedy in faults(rule="nowhere.rules:score", code=None)[0]
    (tmp_path / "own_package").mkdir()
    assert "There is no module own_package.rules" in faults(rule="own_package.rules:score")[0]
    broken = module("import json\nimport no_such_library\n")
    expected = (
        f"{broken}, which selfplay.rule names, imports no_such_library, which this Python does not have ({broken}.py"
    )
    assert expected in faults(rule=f"{broken}:score")[0]
    for source, error in [("1 / 0", "ZeroDivisionError"), ("def (", "SyntaxError"), ("exit(3)", "SystemExit: 3")]:
        wrong = module(source)
        assert f"{wrong}, which selfplay.rule names, cannot be imported: {error}" in faults(rule=f"{wrong}:score")[0]


def test_all_faults_of_own_code_come_at_once(module, faults):
    own = module(SOURCE)
    found = faults(
        rule=f"{own}:two", questioner={"reward": f"{own}:large"}, own_tasks={"a": f"{own}:task", "b": f"{own}:no"}
    )
    assert [fault.split(":")[0] for fault in found] == [
        "selfplay.rule",
        "selfplay.questioner.reward",
        "selfplay.own_tasks.a",
        "selfplay.own_tasks.b",
    ]


def test_a_module_in_the_current_folder_needs_to_be_told(module, tmp_path, monkeypatch):
    """A resumed run and a job start in other folders."""
    monkeypatch.chdir(tmp_path)
    name = module("def score(task, prediction, reference): return True")
    found = Findings()
    assert check_own_code(found, SelfPlayConfig(rule=f"{name}:score")) is None
    assert f"set selfplay.code to the folder that holds {name}." in str(found.faults[0])
    assert check_own_code(Findings(), SelfPlayConfig(rule=f"{name}:score", code=tmp_path)) == {}


def test_preflight_tries_own_code_in_a_process_without_torch(module, tmp_path, monkeypatch):
    def check(name: str) -> str:
        found = Findings()
        assert check_own_code(found, SelfPlayConfig(code=tmp_path, rule=f"{name}:score")) is None
        (fault,) = found.faults
        return str(fault)

    heavy = module("import torch\ndef score(task, prediction, reference): return True")
    assert f"selfplay.rule: {heavy}, which selfplay.rule names, imports torch ({heavy}.py, line 1), which" in check(
        heavy
    )
    crash = module("import os, sys\nprint('bye', file=sys.stderr)\nos._exit(7)")
    assert f"trying {crash}:score ended Python with status 7: bye. Correct the code" in check(crash)
    monkeypatch.setattr("spell_megatron.preflight.own_code._SECONDS", 0.01)
    slow = module("while True: pass")
    assert f"selfplay.rule: {slow}:score did not come to an end within 0.01 seconds." in check(slow)
    assert not {heavy, crash, slow} & set(sys.modules)


def test_values_of_other_number_types_are_numbers(module, tmp_path):
    own = module("""
        import numpy as np
        def score(task, prediction, reference): return np.bool_(prediction == reference)
        """)
    tasks = Tasks(SelfPlayConfig(code=tmp_path, rule=f"{own}:score"))
    assert (tasks.score("docmath_qa", "1", "1"), tasks.score("docmath_qa", "1", "2")) == (1, 0)
    assert tasks.score("docmath_qa", None, "1") == 0


def test_prompts_of_a_task_are_checked(module, tmp_path):
    own = module(SOURCE)
    tasks = Tasks(SelfPlayConfig(code=tmp_path, own_tasks={"mine": f"{own}:task"}))
    with pytest.raises(UserError, match=r"prompts/questioner.md cannot be read"):
        PromptSet.load("full", own=tasks.own_prompts)


def problems(**selfplay) -> list[str]:
    """The faults of settings that need not be looked up."""
    text = [f"selfplay.{key}={value}" for key, value in selfplay.items()]
    reading = read_config(None, ["model.path=m", "data.documents=d", *text])
    return [str(fault) for fault in reading.faults]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "{doc_mcq: 1.0}"}, "selfplay.tasks.doc_mcq: 'doc_mcq' is not one of docmath_qa, doc_general_qa,"
         " doc_mc. Did you mean doc_mc?"),
        ({"own_tasks": "{doc_mc: m:t}"}, "'doc_mc' cannot be the name of a task of your own."),
        ({"own_tasks": "{rate: m:t}"}, "'rate' cannot be the name of a task of your own."),
        ({"own_tasks": "{../up: m:t}"}, "'../up' cannot be the name of a task of your own."),
        ({"own_tasks": "{mine: m:t}"}, "the task mine has no share in selfplay.tasks. Give it one, or 0 if only"),
        ({"questioner.reward": "gausian"}, "'gausian' is not one of gaussian, azr, r_zero, variance, MODULE:FUNCTION."
         " Did you mean gaussian?"),
        ({"code": "folder"}, "selfplay.code: no setting names code of your own."),
    ],
)  # fmt: skip
def test_settings_of_own_code_that_do_not_fit(settings, message):
    (fault,) = problems(**settings)
    assert message in fault


def test_own_code_is_found_from_another_folder_and_in_a_resumed_run(tmp_path, monkeypatch):
    """The folder is absolute in the run's settings, from which processes and jobs start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "settings.yaml").write_text("selfplay: {code: mine, rule: 'rules:score'}\n")
    words = ["model.path=m", "data.documents=d"]
    assert load_config("settings.yaml", words).selfplay.code == tmp_path / "mine"
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "settings.yaml", words).selfplay.code == tmp_path / "mine"


def test_jobs_know_the_folder_as_the_nodes_see_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    words = ["model.path=mine", "data.documents=mine", "selfplay.code=mine", "selfplay.rule='rules:score'"]
    here, elsewhere = load_config(None, words), load_config(None, words)
    place(here, near := Site(folder=tmp_path), weights=False)
    assert here.selfplay.code == tmp_path / "mine" and not missing_files(here, near)
    here.selfplay.code = tmp_path / "gone"
    assert [fault.keys for fault in missing_files(here, near)] == [("selfplay.code",)]
    place(elsewhere, Site(folder=Path("/scratch/me"), ssh={"host": "login", "user": "me"}), weights=False)
    assert elsewhere.selfplay.code == Path("/scratch/me/mine")
