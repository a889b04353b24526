"""Credentials in a recipe's URLs are refused, signatures redacted where the recipe is stored."""

import pytest

from bifrost.recipes import RecipeError, load_recipe
from bifrost.recipes.secrets import redact


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("tracking.uri=http://anna:hunter2@host:5000", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri=https://hunter2@host", "MLFLOW_TRACKING_TOKEN"),
        ("tracking.uri=https://host/?token=hunter2", "MLFLOW_TRACKING_TOKEN"),
        ("tracking.uri=postgresql://anna:hunter2@host/mlflow", "MLFLOW_TRACKING_URI"),
        ("tracking.uri=mysql+pymysql://host/mlflow?user=a&password=hunter2", "MLFLOW_TRACKING_URI"),
        ("data.shards=https://anna:hunter2@host/{0..9}.tar", "~/.netrc"),
        ("data.shards=[a.tar, 'https://anna:hunt@er2@host/b.tar']", "~/.netrc"),
        ("init_from=s3://key:hunter2@bucket/run", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_login_is_refused_and_not_printed(override: str, remedy: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"{key}: \w.* would be stored with the run: ") as error:
        load_recipe("tiny-mllm", [override])
    assert remedy in str(error.value)
    assert "hunter2" not in str(error.value) and "er2@" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=postgresql://anna@host/mlflow",
        "tracking.uri=sqlite:////shared/mlflow.db",
        "tracking.uri=databricks://profile",
        "data.shards=hf://datasets/org/name@main/{0..9}.tar",
        "data.shards=https://host/a.tar?X-Amz-Signature=0123",
        "data.shards=s3://bucket/keys/a.tar",
    ],
)
def test_urls_without_login_are_accepted(override: str) -> None:
    load_recipe("tiny-mllm", [override])


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://h/a.tar?X-Amz-Credential=AK%2F1&X-Amz-Date=7&X-Amz-Signature=ab", ["AK%2F1", "=ab"]),
        ("https://h/a.tar?GoogleAccessId=me&Expires=9&Signature=ab%2B", ["=me", "ab%2B"]),
        ("https://h/c/{0..9}.tar?sv=2024&se=2027-01-01&sp=r&sig=ab%3D", ["ab%3D"]),
        ("shards: 'https://h/a.tar?token=abc'\nname: x", ["abc"]),
        ('{"shards": "https://h/a.tar?access_token=abc", "steps": 5}', ["abc"]),
        ("https://u:p@h/a and ftp://v@h/b", ["u:p", "v@"]),
    ],
)
def test_redact(text: str, hidden: list[str]) -> None:
    found = redact(text)
    assert not any(secret in found for secret in hidden)
    assert redact(found) == found
    for kept in ("h/a", "Expires=9", "sv=2024", "se=2027-01-01", "name: x", '"steps": 5', "X-Amz-Date=7"):
        assert (kept in found) == (kept in text)
