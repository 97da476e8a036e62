from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.config.resume import with_overrides
from launcher.config.sections.data import Source
from launcher.errors import ConfigError
from launcher.security.redaction import environment_secrets, has_login, looks_secret, redact, redact_setting, secret_problem

Shown = Callable[..., str]

# Concatenated so that secret scanners do not flag this file.
TOKENS = {
    "hugging_face": "hf" + "_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    "wandb": "0123456789abcdef" * 2 + "01234567",
    "wandb_versioned": "wandb" + "_v1_" + "aBcDeFgHiJkLmNoPqRsT",
    "openai": "sk" + "-proj-" + "abcdefghijklmnopqrst",
    "github": "ghp" + "_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws_session": "ASIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N",
}


@pytest.mark.parametrize("kind", TOKENS)
def test_every_form_of_token_is_recognized(kind: str) -> None:
    assert looks_secret("run.name", TOKENS[kind])
    assert redact(f"a {TOKENS[kind]} b") == "a <redacted> b"


def test_tokens_and_keys_that_name_a_secret_are_refused_and_never_shown(shown: Shown) -> None:
    token = TOKENS["hugging_face"]
    keys = ("tracking.project", "model.path", "model.config.note", "nothing.at_all")
    names = ("tracking.api_key", "tracking.password", "hf_token", "model.config.token", "run.secret")
    text = shown(*(f"{key}={token}" for key in keys), *(f"{key}=short1" for key in names))
    assert token not in text
    assert "short1" not in text
    for key in (*keys, *names):
        assert f"{key}: looks like a secret" in text


@pytest.mark.parametrize(
    "token",
    [
        f"model={TOKENS['hugging_face']}",
        f"{TOKENS['hugging_face']}=1",
        f"=={TOKENS['hugging_face']}",
        f"run.name=a({TOKENS['hugging_face']}",
    ],
)
def test_a_token_in_any_place_is_not_shown(shown: Shown, token: str) -> None:
    assert TOKENS["hugging_face"] not in shown(token)


# An AWS secret key has no recognizable format.
AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize("key", ["tracking.group", "cluster.additional_parameters.comment", "deepspeed.extra.note"])
def test_a_value_that_the_environment_holds_as_a_secret_is_refused(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    text = shown("cluster=slurm", f"{key}='{AWS_SECRET}'")
    assert f"{key}: contains the value of AWS_SECRET_ACCESS_KEY in the environment" in text
    assert AWS_SECRET not in text
    assert "remedy: put secrets into environment variables" in text


@pytest.mark.parametrize(
    "tokens",
    [
        ("data=jsonl", 'data.path="https://host/${oc.env:DB_PASSWORD}.jsonl"'),
        ("tracking.group=${oc.env:DB_PASSWORD}",),
        ("+model.config.note=\"${oc.decode:'{${oc.env:DB_PASSWORD}: 1}'}\"",),
    ],
)
def test_no_reference_reads_a_secret(shown: Shown, monkeypatch: pytest.MonkeyPatch, tokens: tuple[str, ...]) -> None:
    """`plan` lists files at an address, so the author of the settings could send the secret to their own server."""
    monkeypatch.setenv("DB_PASSWORD", SIGNED)
    text = shown(*tokens)
    assert "DB_PASSWORD: a setting must not read this variable, which looks like a secret" in text
    assert SIGNED not in text


def test_variables_that_are_no_secrets_are_read(compose: Callable[..., list], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "none")
    monkeypatch.setenv("PROJECT", "a-project-of-mine")
    tracking = compose("model=tiny", "tracking.group=${oc.env:SORT_KEY}", "tracking.project=${oc.env:PROJECT}")[0].config.tracking
    assert (tracking.group, tracking.project) == ("none", "a-project-of-mine")


def test_what_the_environment_holds_is_shown_nowhere(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    assert AWS_SECRET not in shown(f"tracking.gruop='{AWS_SECRET}'", f"train.max_steps='{AWS_SECRET}'")


@pytest.mark.parametrize(
    ("key", "address"),
    [("model.config.note", "me:hunter2@db.example.org"), ("cluster.env.https_proxy", "http://me:hunter2@proxy:3128")],
)
def test_an_address_with_a_password_is_refused_under_any_key(shown: Shown, key: str, address: str) -> None:
    text = shown("cluster=slurm", f"{key}='{address}'")
    assert "hunter2" not in text
    assert f"{key}: contains a user with a password" in text
    assert "hunter2" not in shown(f"tracking.group='{address}'"), "nor where the value is wrong for another reason"


def test_resume_refuses_secrets(compose: Callable[..., list], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("model=tiny")[0].config
    with pytest.raises(ConfigError) as error:
        with_overrides(config, [f"tracking.group={TOKENS['hugging_face']}"])
    assert "looks like a secret" in str(error.value)
    assert TOKENS["hugging_face"] not in str(error.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    for value in (AWS_SECRET, "http://me:" + f"{AWS_SECRET[:5]}@proxy:1"):
        with pytest.raises(ConfigError) as error:
            with_overrides(config, [f"data.eval_split={value}"])
        assert "data.eval_split: contains" in str(error.value)
        assert AWS_SECRET[:5] not in str(error.value)
    slurm = compose("model=tiny", "cluster=slurm")[0].config
    with pytest.raises(ConfigError) as error:
        with_overrides(slurm, ["cluster.env={NCCL_DEBUG: INFO, MY_TOKEN: hunter2}"])
    assert "cluster.env.MY_TOKEN: looks like a secret" in str(error.value)
    assert "hunter2" not in str(error.value)


NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD"),
    *("PGPASSWORD", "AUTHTOKEN", "SSHPASS", "GITHUB_PAT", "MYSQL_PWD", "GPG_PASSPHRASE", "SMTP_PASS"),
)


def test_variables_of_the_environment_that_hold_secrets_are_recognized() -> None:
    others = ("TOKENIZERS_PARALLELISM", "MONKEY", "BYPASS", "COMPASS", "PATH", "PATTERN", "OLDPWD", "NCCL_DEBUG", "KEYBOARD")
    assert sorted(environment_secrets(dict.fromkeys((*NAMES, *others), "hunter2hunter2"))) == sorted(NAMES)


def test_a_variable_of_a_job_that_names_a_secret_is_refused(shown: Shown) -> None:
    text = shown("cluster=slurm", *(f"cluster.env.{name}=hunter2" for name in NAMES))
    assert "hunter2" not in text
    assert all(f"cluster.env.{name}: looks like a secret" in text for name in NAMES)


SIGNED = "hunter2hunter2"


@pytest.mark.parametrize(
    "address",
    [
        f"https://host/a.jsonl?sv=2024&sig={SIGNED}",
        f"https://host/a.jsonl?X-Amz-Credential=a&X-Amz-Signature={SIGNED}",
        f"https://host/a.jsonl?x-goog-signature={SIGNED}",
        f"https://host/a.jsonl?Expires=1&Signature={SIGNED}",
        f"simplecache::https://host/a.jsonl?access_token={SIGNED}",
        f"https://host/a.jsonl?key={SIGNED}",
        f"https://{SIGNED}@host/a.jsonl",
        f"s3://user:{SIGNED}@bucket/a.jsonl",
        f"abfs://container:{SIGNED}@account/a.jsonl",
    ],
)
def test_an_address_with_credentials_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="contains a "):
        Source(path=address)


def test_an_address_with_credentials_is_not_shown(shown: Shown) -> None:
    text = shown(f'data.path="https://host/a.jsonl?key={SIGNED}"', f'data.eval_path="s3://user:{SIGNED}@bucket/a.jsonl"')
    assert "data.path: contains a " in text
    assert "data.eval_path: contains a " in text
    assert SIGNED not in text


@pytest.mark.parametrize(
    "address",
    [
        *("https://host/a.jsonl?download=true", "abfs://container@account.dfs.core.windows.net/a.jsonl"),
        *("hf://datasets/o/n@v1/a.jsonl", "s3://bucket/a@b.jsonl", "data/part?key=1.jsonl", "gs://bucket/key=1/a.jsonl"),
    ],
)
def test_an_address_without_credentials_is_accepted(address: str) -> None:
    assert Source(path=address).path == address


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.revision", TOKENS["wandb"]),
        ("data.sources[0].revision", TOKENS["wandb"]),
        ("model.config.bos_token", "<|begin_of_text|>"),
        ("model.config.pad_token", "<|pad|>"),
        ("model.tokenizer", "Qwen/Qwen3-8B"),
        ("run.name", "hf_finetune"),
        ("tracking.project", "sk-learn"),
        ("run.seed", 12345678),
        ("cluster.env.NCCL_IB_PKEY", "3"),
        ("cluster.env.TOKENIZERS_PARALLELISM", "true"),
        ("model.path", "run:demo@12"),
        ("cluster.container_image", "nvcr.io#nvidia/pytorch:24.01"),
        ("cluster.container_image", "docker://nvcr.io/nvidia/pytorch:24.01@sha256:0123"),
        ("cluster.additional_parameters.comment", "mailto:me.too@example.org"),
        ("data.path", "abfs://container@account.dfs.core.windows.net/a"),
        ("tracking.api_key", None),
        ("tracking.api_key", ""),
    ],
)
def test_values_that_only_resemble_secrets_are_accepted(key: str, value: object) -> None:
    assert not looks_secret(key, value)
    assert not has_login(value)
    assert secret_problem(key, value, {}) is None


def test_redaction_keeps_the_rest() -> None:
    token = TOKENS["hugging_face"]
    assert redact(f"a={token} b=2") == "a=<redacted> b=2"
    address = "sftp://user:" + "hunter2@host:22/runs"
    assert redact(f"resume {address}/a --step 5") == "resume sftp://<redacted>@host:22/runs/a --step 5"
    assert redact("s3://bucket/a:b@c file:///x:y@z http://host:80/a@b sftp://user@host/x") == (
        "s3://bucket/a:b@c file:///x:y@z http://host:80/a@b sftp://user@host/x"
    )
    assert redact("x.password=abc def") == "x.password=<redacted>"
    key = TOKENS["wandb"]
    commits = (
        f"model.revision={key}",
        f"{{revision: {key}}}",
        f'"revision": "{key}"',
        f"/models--o--n/snapshots/{key}/config.json",
    )
    for commit in commits:
        assert redact(commit) == commit
    assert redact(f"data.path=/a/{key}/{key}") == "data.path=/a/<redacted>/<redacted>"
    assert redact_setting("data.path", f"/a/{key}/b") == f"/a/{key}/b"
    assert redact_setting("data.path", key) == "<redacted>"
    assert redact("sftp://a:b:c@d@host/x") == "sftp://<redacted>@host/x"
    assert redact("model.tokenizer=org/name") == "model.tokenizer=org/name"
