"""Names of the hub in place of folders, against a server that speaks the hub's protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, serve_hub

from spell_megatron.cli import main
from spell_megatron.config.reading import as_recorded, load_config
from spell_megatron.errors import UserError
from spell_megatron.hub import fetch_documents, fetch_model, model_name, name_of

ROOT = Path(__file__).parents[1]
POLICY = ROOT / "examples" / "quickstart" / "policy"
DOCUMENTS = ROOT / "examples" / "quickstart" / "documents.parquet"
NAME = "acme/tiny"
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"code",
    "consolidated.safetensors": b"again",
    "onnx/config.json": b"{}",
    "README.md": b"A model.",
}


@pytest.fixture
def at_hub(tmp_path, monkeypatch) -> Hub:
    """The hub of this process, with a model; its cache is empty."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.add_folder(NAME, POLICY, {**UNWANTED, "additional_chat_templates/tool.jinja": b"{{ messages }}"})
        yield hub


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_a_name_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert str(model_name(Path("Qwen/Qwen3-0.6B"))) == "Qwen/Qwen3-0.6B"
    found = model_name(Path("Qwen/Qwen3-0.6B@refs/pr/1"))
    assert found and (found.repository, found.revision) == ("Qwen/Qwen3-0.6B", "refs/pr/1")
    for path in ("here/model", "Qwen", "a/b/c", "/a/b", "../b", "~/b", "a/b@", "a/b@c@d", "runs/x/checkpoints"):
        assert model_name(Path(path)) is None, path


def test_a_model_comes_without_pickles_code_and_copies(at_hub):
    folder = fetch_model(Path(NAME))
    wanted = {path.name for path in POLICY.iterdir()} | {"additional_chat_templates/tool.jinja"}
    assert files_of(folder) == wanted
    assert set(at_hub.fetched) == wanted


def test_weights_are_left_out_where_they_are_not_needed_and_come_later(at_hub):
    folder = fetch_model(Path(NAME), weights=False)
    assert not list(folder.glob("*.safetensors")) and (folder / "tokenizer.json").is_file()
    sent = len(at_hub.fetched)
    assert fetch_model(Path(NAME)) == folder
    assert at_hub.fetched[sent:] == ["model.safetensors"]


def test_a_name_with_its_commit_needs_no_hub_any_more(at_hub, offline, capfd):
    folder = fetch_model(Path(NAME))
    assert "fetching acme/tiny from the hub to" in capfd.readouterr().err
    named = name_of(folder)
    assert named == f"{NAME}@{at_hub.branches[NAME]['main']}"
    at_hub.add(NAME, {"config.json": b"{}"})  # a newer commit
    assert fetch_model(Path(named)) == folder
    newest = fetch_model(Path(NAME))
    assert newest != folder and files_of(newest) == {"config.json"}
    offline()
    assert fetch_model(Path(named)) == folder
    assert fetch_model(Path(NAME)) == newest


def test_a_folder_outside_the_cache_keeps_its_path(tmp_path):
    for folder in (POLICY, tmp_path / "models--a--b" / "snapshots" / ("0" * 40)):
        assert name_of(folder) == str(folder)


def test_a_branch_and_a_commit(at_hub):
    first = at_hub.branches[NAME]["main"]
    other = at_hub.add(NAME, {"config.json": b"{}"}, branch="refs/pr/1")
    assert fetch_model(Path(f"{NAME}@refs/pr/1")).name == other
    assert fetch_model(Path(f"{NAME}@{first}")).name == first


def test_why_the_hub_does_not_give_a_model(at_hub, monkeypatch):
    at_hub.add("acme/closed", {"config.json": b"{}"})
    at_hub.gated.add("acme/closed")
    for name, words in {
        "acme/closed": ["accepted its conditions", "https://huggingface.co/acme/closed", "HF_TOKEN"],
        "acme/tyni": ["There is no folder acme/tyni, and the hub has no model acme/tyni", "HF_TOKEN"],
        f"{NAME}@v9": [f"has no revision v9. https://huggingface.co/{NAME}/commits/main lists the commits"],
    }.items():
        with pytest.raises(UserError) as error:
            fetch_model(Path(name))
        assert all(word in str(error.value) for word in words), error.value
    with serve_hub() as gone:
        pass
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(UserError, match=r"cannot be fetched from the Hugging Face hub \(.+\). Try again") as error:
        fetch_model(Path(NAME))
    assert f"hf download {NAME}" in str(error.value) and "in place of acme/tiny" in str(error.value)


def test_without_a_network_it_is_said_where_a_model_is_looked_for(at_hub, offline, tmp_path):
    offline()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to fetch it") as error:
        fetch_model(Path(f"{NAME}@v1"))
    assert str(tmp_path / "cache") in str(error.value)
    assert f"`hf download {NAME} --revision v1`" in str(error.value)


def test_a_cache_that_lacks_files_is_not_taken_for_the_model(at_hub, offline):
    fetch_model(Path(NAME), weights=False)
    offline()
    with pytest.raises(UserError, match="or not whole"):
        fetch_model(Path(NAME))


def test_settings_name_the_commit_and_read_back(at_hub, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{path: {NAME}}}\ndata: {{documents: d.parquet}}\n")
    config = load_config(run)
    assert config.model.path == Path(NAME)
    config.model.path = fetch_model(config.model.path)
    recorded = as_recorded(config)
    assert str(recorded.model.path) == f"{NAME}@{at_hub.branches[NAME]['main']}"
    assert config.model.path.is_dir()
    (tmp_path / NAME).mkdir(parents=True)  # a folder of this name wins
    assert load_config(run).model.path == tmp_path / NAME


def test_a_run_is_checked_and_planned_and_begun_by_name(at_hub, tmp_path, capsys):
    commit = at_hub.branches[NAME]["main"]
    words = ["--model", NAME, "--documents", str(DOCUMENTS), "--selfplay.prompts=compact"]
    assert main(["init", "run.yaml", *words, "--rollout.sampling.max_response_tokens=48"]) == 0
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["model"]["path"] == f"{NAME}@{commit}"
    assert main(["plan", "run.yaml", "--gpu", "H100-80G", "--model.dtype=bfloat16"]) == 0
    assert "model.safetensors" not in at_hub.fetched
    capsys.readouterr()
    result = subprocess.run(
        [sys.executable, "-m", "spell_megatron", "train", "run.yaml", "--dry-run", f"--model.path={NAME}"],
        capture_output=True,
        text=True,
        env=at_hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["model"]["path"] == f"{NAME}@{commit}"
    assert str(tmp_path / "home" / "hub") in result.stdout  # where the engines find it


def test_all_faults_of_a_run_are_told_with_that_of_its_name(at_hub, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {path: acme/tyni}\ndata: {documents: d.parquet}\n")
    assert main(["train", "run.yaml", "--dry-run", "--run.device=cpu"]) == 2
    errors = capsys.readouterr().err
    assert "the hub has no model acme/tyni" in errors and "d.parquet does not exist" in errors
    assert errors.count("model.path") == 1


def test_a_name_without_its_owner_leads_to_the_whole_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {path: Qwen3-0.6B}\ndata: {documents: d.parquet}\n")
    for words in (["train", "run.yaml", "--dry-run", "--run.device=cpu"], ["plan", "run.yaml"]):
        assert main(words) == 2
        assert "(ORG/NAME)" in capsys.readouterr().err


def test_other_commands_take_names(at_hub, tmp_path, capsys):
    assert main(["convert", "hf-to-megatron", "--hf", NAME, "--megatron", "m", "--verify"]) == 0
    assert "are the same in both" in capsys.readouterr().out
    words = ["--max-cluster-tokens", "500", "--max-cluster-chars", "8000", "--tokenizer", NAME]
    text = tmp_path / "text.txt"
    text.write_text("The bridge of Sorrel was built by Ada Lindqvist in 1931. " * 20)
    assert main(["prepare", str(text), "--out", "out.jsonl", *words]) == 0
    assert main(["evaluate", "--model", "acme/tyni", "--benchmark", "mine=x.jsonl", "--out", "e"]) == 2
    assert main(["ask", "acme/tyni", "--documents", str(text), "Who?"]) == 2
    assert capsys.readouterr().err.count("the hub has no model acme/tyni") == 2


def test_documents_of_the_hub(at_hub, tmp_path, capsys):
    def row(name: str) -> bytes:
        return json.dumps(
            {"text": f"The {name} of Sorrel stands beside the river, and was built by hand. " * 5}
        ).encode()

    texts = {
        "README.md": b"About this data set. " * 50,
        "a/x.jsonl": row("mill"),
        "b/y.jsonl": row("inn"),
        "z.bin": b"0",
    }
    commit = at_hub.add("datasets/acme/texts", texts)
    assert main(["prepare", "hf://datasets/acme/texts", "--out", "all.jsonl"]) == 0
    assert {"a/x.jsonl", "b/y.jsonl", "README.md"} == set(at_hub.fetched)
    made = (tmp_path / "all.jsonl").read_text()
    assert "mill" in made and "inn" in made and "About" not in made and "a/x.jsonl:1" in made
    assert main(["prepare", f"hf://datasets/acme/texts@{commit}/b/y.jsonl", "--out", "one.jsonl"]) == 0
    assert "mill" not in (tmp_path / "one.jsonl").read_text()
    assert main(["prepare", "hf://datasets/acme/texts/b", "--out", "part.jsonl"]) == 0
    assert "y.jsonl:1" in (tmp_path / "part.jsonl").read_text()
    for wrong, words in {
        "hf://acme/texts": "Write hf://datasets/ORG/NAME",
        "hf://datasets/acme/texts/../b": "Write hf://datasets/ORG/NAME",
        "hf://datasets/acme/texts/c": "no .txt, .md, .jsonl or .parquet files in c",
        "hf://datasets/acme/text": "The hub has no data set acme/text",
    }.items():
        with pytest.raises(UserError, match=words):
            fetch_documents(wrong)


def test_a_job_gets_the_folder_in_the_cache(at_hub):
    from spell_megatron.jobs.paths import place
    from spell_megatron.jobs.site import Site

    config = load_config(None, [f"model.path={NAME}", "data.documents=d.parquet"])
    place(config, Site(), weights=True)
    assert config.model.path == fetch_model(Path(NAME)) and config.model.path.is_absolute()
    config.model.path = Path(NAME)
    with pytest.raises(UserError, match="cannot be fetched from here to login1"):
        place(config, Site.model_validate({"ssh": {"host": "login1"}}), weights=True)


def test_processes_of_a_run_take_the_commit_of_the_first(at_hub):
    from spell_megatron.cli.train import _same_model

    config = load_config(None, [f"model.path={NAME}", "data.documents=d.parquet"])
    config.model.path = fetch_model(config.model.path)
    assert _same_model(config) == [f"--model.path={NAME}@{at_hub.branches[NAME]['main']}"]
    config.model.path = POLICY
    assert _same_model(config) == []


def test_processes_with_other_commits_do_not_train_together(monkeypatch):
    from spell_megatron import train

    first, other = f"{NAME}@{'a' * 40}", f"{NAME}@{'b' * 40}"
    monkeypatch.setattr(train, "from_rank_0", lambda _: first)
    train.check_same_commit(first)
    train.check_same_commit(str(POLICY))  # a copy on this machine
    with pytest.raises(UserError, match=f"--model.path={first}"):
        train.check_same_commit(other)
