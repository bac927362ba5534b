"""What a chat template does to turns: token ids, and which of them the assistant writes.

The ids are always those of the model's own template, which is also the one saved. Generation
markers in it say what is trained; where it has none, the same family's training template from
TRL serves for the mask, and only where its ids are equal; where there is none, the answers are
found by rendering the prompt of every turn (`trainer/data/spans.py`).
"""

from __future__ import annotations

import re
from typing import Any

from trainer.data.tools import tools_of
from trainer.errors import TemplateError
from trainer.models.template_date import date_options
from trainer.profiles import Message

PROBE = [
    Message(role="user", content="a"),
    Message(role="assistant", content="b"),
]
# Templates that know thinking leave an empty thought in the prompt; the others ignore the name.
TEMPLATE_OPTIONS: dict[str, Any] = {"enable_thinking": False}


class ChatTemplate:
    """A tokenizer's chat template with a provable assistant mask."""

    def __init__(self, tokenizer: Any) -> None:
        """Find where the mask comes from.

        Raises:
            TemplateError: no template, or no way to prove what the assistant writes.
        """
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template, so turns cannot be put into tokens; choose an "
                "instruction-tuned model, or add chat_template.jinja to the model folder."
            )
        self.has_mask, self.mask_template, self.source = _mask_template(tokenizer)
        origin = getattr(tokenizer, "template_origin", None)
        if origin is not None:
            self.source = self.source.replace("the model's own template", f"template {origin}")
        self.stop_ids = self._find_stop_ids()

    def render(
        self, conversations: list[list[Message]], *, generation_prompt: bool = False, **options: Any
    ) -> list[list[int]]:
        """Token ids of conversations by the model's own template.

        Args:
            generation_prompt: end with the header that asks for an answer.
            options: names for the template, such as `enable_thinking` (False by default).
        Raises:
            TemplateError: the template refuses a conversation; its own words are in the message.
        """
        rendered = self._apply(conversations, add_generation_prompt=generation_prompt, **options)
        ids: list[list[int]] = rendered["input_ids"]
        return ids

    def render_with_mask(
        self, conversations: list[list[Message]]
    ) -> list[tuple[list[int], list[int] | None]]:
        """Ids of the model's own template, and a mask of 1 where the assistant writes.

        Returns:
            For each conversation its ids and a mask of equal length; None instead of the mask
            where there are no markers, or the training template's ids differ from the model's own.
        """
        if not self.has_mask:
            return [(ids, None) for ids in self.render(conversations)]
        masked = self._apply(
            conversations, chat_template=self.mask_template, return_assistant_tokens_mask=True
        )
        if self.mask_template is None:
            return list(zip(masked["input_ids"], masked["assistant_masks"], strict=True))
        own = self.render(conversations)
        return [
            (ids, mask if ids == mask_ids else None)
            for ids, mask_ids, mask in zip(
                own, masked["input_ids"], masked["assistant_masks"], strict=True
            )
        ]

    def _apply(self, conversations: list[list[Message]], **options: Any) -> Any:
        """One call for all conversations; those with tools of their own need a call each."""
        if any(tools_of(row) for row in conversations):
            parts = [self._apply_alike([row], tools_of(row), options) for row in conversations]
            return {key: [value for part in parts for value in part[key]] for key in parts[0]}
        return self._apply_alike(conversations, None, options)

    def _apply_alike(
        self,
        conversations: list[list[Message]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> Any:
        if tools is not None:
            options = {**options, "tools": tools}
        own = options.get("chat_template")
        try:
            return self.tokenizer.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                **{**TEMPLATE_OPTIONS, **options, **date_options(self.tokenizer, own)},
            )
        except Exception as error:  # jinja2 errors, and whatever a template raises itself
            raise TemplateError(
                f"the model's chat template refuses these turns: {' '.join(str(error).split())}"
            ) from error

    def _find_stop_ids(self) -> frozenset[int]:
        """The tokens that end a turn: the end-of-text token, and what follows a probe answer."""
        tokenizer = self.tokenizer
        stops = {tokenizer.eos_token_id} - {None}
        special = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)
        prompt = self.render([PROBE[:1]], generation_prompt=True)[0]
        # Some families end a turn with the header of the next one, which may be a tool's.
        for next_role in ("user", "tool"):
            row = [*PROBE, Message(role=next_role, content="c")]
            try:
                ids = self.render([row])[0]
            except TemplateError:
                continue  # a family without tools, or one that wants a call before its result
            after = [index for index in ids[shared_prefix(ids, prompt) :] if index in special]
            stops.update(after[:1])
        if not stops:
            raise TemplateError(
                "neither the tokenizer nor its chat template has a token that ends a turn, so a "
                "model trained with it could never stop; set eos_token in tokenizer_config.json."
            )
        return frozenset(stops)


def _mask_template(tokenizer: Any) -> tuple[bool, str | None, str]:
    """Is there a mask, the template that gives it (None: the tokenizer's own), and its source."""
    if re.search(r"\{%[-+]?\s*generation\b", tokenizer.chat_template):
        return True, None, "the model's own template (generation markers)"
    # Importing TRL takes seconds, so only templates without markers pay for it.
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:
        return False, None, "the model's own template (answers found by rendering each prompt)"
    return (
        True,
        template,
        "the model's own template (mask by TRL's training template of its family)",
    )


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many leading ids two sequences share."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def is_prefix(prompt: list[int], ids: list[int]) -> bool:
    """Whether `ids` begin with all of `prompt`."""
    return ids[: len(prompt)] == prompt
