from __future__ import annotations

from sglang_auf.hooks.redaction import SECRETS, redacted


def test_secrets_are_masked_and_nothing_else() -> None:
    shown = {"api_key": "k", "admin_api_key": "a", "ssl_keyfile_password": "p", "port": 1, "host": "h"}
    assert redacted(shown) == {"port": 1, "host": "h"} | dict.fromkeys(SECRETS, "***")
    assert shown["api_key"] == "k", "what SGLang works with is another dictionary"


def test_no_key_stays_no_key() -> None:
    assert redacted({"api_key": None}) == {"api_key": None}


def test_the_names_are_sglangs() -> None:
    from sglang.srt.server_args import ServerArgs

    shown = ServerArgs(model_path="m", api_key="a key").resolved_dict()
    assert shown["api_key"] == "a key"
    assert set(SECRETS) <= set(shown)
