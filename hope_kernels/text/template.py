"""Chat templates: messages to one text, by a Jinja template that came with the model.

A template is foreign code. It runs in Jinja's sandbox, sees plain data only, and gets the settings, functions
and filters that transformers gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .extra import MissingExtra, extra

SAFE = (3, 1, 6)  # of Jinja: escapes from the sandbox are known of older ones


class ChatTemplate:
    """special: the names of special tokens, which the template may use as variables. Raises ValueError for a
    template that is none, MissingExtra without jinja2."""

    def __init__(self, source: str, special: Mapping[str, str]):
        jinja = extra("jinja2", "a chat template")
        if tuple(int(n) for n in jinja.__version__.split(".")[:3] if n.isdigit()) < SAFE:
            raise MissingExtra(f"a chat template needs jinja2 >= 3.1.6, found {jinja.__version__}; install "
                               "it with pip install 'hope_kernels[text]'")
        self._special = dict(special)
        try:
            self._template = _environment(jinja).from_string(source)
        except jinja.TemplateError as error:
            raise ValueError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of the messages, each a dict with "role" and "content". add_generation_prompt: also how
        the answer begins. Raises ValueError where the template refuses them."""
        try:
            plain = json.loads(json.dumps(list(messages)))  # objects with methods stay outside the sandbox
        except (TypeError, ValueError) as error:
            raise ValueError(f"chat: argument messages holds what is no plain data ({error})") from None
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in plain):
            raise ValueError("chat: argument messages has an entry that is no dict with a role")
        variables = {**self._special, "messages": plain, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(**variables)
        except Exception as error:  # of foreign code: its own complaints, or whatever it runs into
            raise ValueError(f"chat: the model's template refuses these messages ({error})") from None


def _environment(jinja: Any) -> Any:
    sandbox, extensions = extra("jinja2.sandbox", "a chat template"), extra("jinja2.ext", "a chat template")

    class Generation(extensions.Extension):
        """{% generation %}...{% endgeneration %}, which marks what a model is trained on: the text inside."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja.TemplateError(message)

    def tojson(x, ensure_ascii=False, **options):  # unlike Jinja's own, without escapes for HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
