"""Prompts from files."""

import json

from dlm_tune.commands.arguments import GenerateArguments
from dlm_tune.commands.generate import read_prompts


def test_only_line_feeds_separate_prompts(tmp_path):
    """JSON and text may hold U+2028, U+0085 or a form feed; Windows writes a byte order mark and CRLF."""
    prompts = ["one\u2028line", "two\x85lines", "three"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts), "utf-8")
    assert read_prompts(GenerateArguments(prompts_file=str(rows))) == prompts
    text = tmp_path / "prompts.txt"
    text.write_bytes("\ufeffone\x0cline\r\n\r\ntwo\r\n".encode())
    assert read_prompts(GenerateArguments(prompts_file=str(text))) == ["one\x0cline", "two"]
