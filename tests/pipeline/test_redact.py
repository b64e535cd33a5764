"""What is masked in messages, rows and the manifest, and what is not."""

from __future__ import annotations

import time

import pytest

from pipeline.errors import one_line
from pipeline.redact import without_secrets

KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
KEY_ID = "AKIAABCDEFGHIJKLMNOP"
HUB = "hf_abcdefghijklmnopqrstuvwxyz"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
SIGNATURE = "fe5f80f77d5fa3beca038a248ff027d0445342fe2855ddc963176630326f1024"

# Text, and what of it must be gone.
SECRETS = {
    "hub token": (f"401 for token {HUB} at the hub", HUB),
    "hub token in a name=value": (f"HF_TOKEN={HUB}", HUB),
    "forge token": ("remote: ghp_abcdefghij0123456789abcdefghij012345 denied", "ghp_"),
    "service key": ("key sk-proj-abc123def456ghi789jkl0 is over quota", "abc123"),
    "google key": ("AIzaSyA1234567890abcdefghijklmnopqrstuv", "SyA123"),
    "json web token": (f"jwt {JWT} expired", "dozjgNryP4J3"),
    "pem": ("-----BEGIN RSA PRIVATE KEY----- MIIEowIBAAKCAQEA -----END RSA PRIVATE KEY----- refused", "MIIEow"),
    "aws key id": (f"The key {KEY_ID} is not known", KEY_ID),
    "aws session key id": ("ASIAABCDEFGHIJKLMNOP expired", "ASIA"),
    "aws keys together": (f"{KEY_ID}:{KEY} was refused", "wJalr"),
    "aws keys in a row": (f"keys {KEY_ID}, {KEY}", "K7MDENG"),
    "aws secret by name": (f"aws_secret_access_key={KEY}", "wJalr"),
    "aws secret as in a credentials file": (f"aws_secret_access_key = {KEY}".replace(" = ", ": "), "wJalr"),
    "aws secret in json": (f'{{"SecretAccessKey": "{KEY}"}}', "wJalr"),
    "aws session token": ("AWS_SESSION_TOKEN=FwoGZXIvYXdzEXAMPLE", "FwoG"),
    "bearer header": ("Authorization: Bearer abcdefgh", "abcdefgh"),
    "bearer header in a dict": ("{'authorization': 'Bearer abc.def-ghi'}", "abc.def"),
    "basic header": ("authorization=Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    "bearer elsewhere": ("sent bearer 0a1b2c3d4e5f6a7b8c9d to the server", "0a1b2c"),
    "api key header": ("x-api-key: abcdefgh", "abcdefgh"),
    "password": ("password=hunter2 was refused", "hunter2"),
    "password behind a colon": ("error: password=hunter2", "hunter2"),
    "password behind another name": ("key: password=hunter2", "hunter2"),
    "password of words": ("{'db_password': 'two words'}", "words"),
    "password in a query": ("postgres://host/db?user=me&password=hunter2&sslmode=on", "hunter2"),
    "encoded equals": ("password%3Dhunter2", "hunter2"),
    "client secret": ("client_secret=short", "short"),
    "account key": ("AccountName=x;AccountKey=abcd1234==;EndpointSuffix=y", "abcd1234"),
    "environment style": ("MY_API_KEY=abc", "=abc"),
    "token that looks like one": ("token=0123456789abcdef0123", "0123456789"),
    "token in a query": ("https://host/file?token=abc&page=2", "=abc"),
    "s3 signed": (
        f"https://b.s3.amazonaws.com/k?X-Amz-Credential={KEY_ID}%2F20261124&X-Amz-Date=1&X-Amz-Signature={SIGNATURE}",
        SIGNATURE,
    ),
    "s3 security token": ("https://b/k?X-Amz-Security-Token=FwoGZX&X-Amz-Expires=60", "FwoGZX"),
    "s3 signed, old": ("https://b/k?AWSAccessKeyId=x1&Expires=1&Signature=vjbyPxybdZaNmGa%2ByT272YEAiv4%3D", "vjbyPx"),
    "gcs signed": (f"https://storage/b/o?X-Goog-Signature={SIGNATURE}&X-Goog-Date=1", SIGNATURE),
    "azure signed": ("https://a.blob.core.windows.net/c/b?sv=2024&sig=aBc%2Fd%3D&se=2026", "aBc%2Fd"),
    "authorization of aws": (f"Credential={KEY_ID}/20261124, SignedHeaders=host, Signature={SIGNATURE}", SIGNATURE),
    "user and password": ("s3://user:pass%2Fword@bucket/docs", "pass"),
    "password with a slash": (f"s3://{KEY_ID}:{KEY}@bucket/docs", "K7MDENG"),
    "user that is a token": (f"https://{HUB}@huggingface.co/org/name", HUB),
}

HARMLESS = [
    "eos_token_id=2",
    "max_tokens=256",
    "token=3",
    "pad_token_id=0, bos_token_id=1",
    "eos_token=<|im_end|>, pad_token=reserved_special_token_250",
    "GenerationConfig(max_new_tokens=256, eos_token_id=[1, 2], sep_token=None)",
    "KeyError: 'token' in tokenizer_config.json",
    "the document has 3 tokens: fine",
    "token: unexpected end of input",
    "password: must not be empty",
    "password=None, api_key=null, secret=False",
    "primary_key=document-0001-of-0002",
    "sort_keys=True key=value num_key_value_heads=8",
    "key: part-000001-0123456789abcdef.parquet",
    "signature=(a, b)",
    "tokens/s=1234, tokenizer=models/tiny-reader, TOKENIZERS_PARALLELISM=false",
    "the bearer of good news came at 12:30",
    "--max-new-tokens 9 leaves no room",
    "a@b.example in s3://bucket/docs/a@b.txt",
    "http://127.0.0.1:8265/jobs/raysubmit_a1b2c3@host",
    "s3://bucket/docs?region=eu-west-1&endpoint_override=127.0.0.1:9000",
    "https://huggingface.co/org/name/resolve/main/model-00001-of-00004.safetensors",
    "0123456789abcdef0123456789abcdef01234567 is a commit",
    "hf_transfer is not installed; task-specific sk-learn",
    "AKIA is how key ids begin",
    "credentials: /home/me/credentials-2026.json is not there",
    "block_size: 128, stride: 16, seed: 5",
]


@pytest.mark.parametrize("case", SECRETS)
def test_secrets_are_masked(case: str) -> None:
    text, secret = SECRETS[case]
    assert secret in text
    assert secret not in without_secrets(text)
    assert "***" in without_secrets(text)
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZERS_CACHE", "models/tiny-reader")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    assert without_secrets(text) == text


def test_what_is_around_a_secret_stays() -> None:
    kept = {
        "password in a query": "postgres://host/db?user=me&password=***&sslmode=on",
        "aws secret in json": '{"SecretAccessKey": "***"}',
        "account key": "AccountName=x;AccountKey=***;EndpointSuffix=y",
        "bearer header": "Authorization: Bearer ***",
        "hub token": "401 for token *** at the hub",
        "aws keys in a row": "keys ***",
    }
    for case, text in kept.items():
        assert without_secrets(SECRETS[case][0]) == text


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "correct-horse")
    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("MAX_TOKENS", "16384000")
    assert without_secrets("correct-horse-battery and correct-horse") == "*** and ***"
    assert without_secrets("/home/me/key.json: 16384000 tokens") == "/home/me/key.json: 16384000 tokens"


@pytest.mark.parametrize("piece", ["a-", "x=", "://", "eyJ-", "token:", "-----BEGIN PRIVATE KEY", "'", "Bearer a"])
def test_long_texts_take_no_long_time(piece: str) -> None:
    begun = time.process_time()
    one_line(piece * (300_000 // len(piece)))
    # Linear: up to 6 s on a slow CPU. What is quadratic takes minutes.
    assert time.process_time() - begun < 20.0
