"""The client of the judge's endpoint."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.judge.prompts import Messages
from capgap.pipeline.models.endpoint import FAULTS, Endpoint
from capgap.schemas.judge_results import Ask, JudgeIdentity
from capgap.schemas.run_judge import JudgeSettings


class JudgeEndpoint(Endpoint):
    """A client that asks the judge.

    Raises:
        SettingError: the key holds characters that a key cannot have.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(settings, settings.model, "the judge", "judge", "judge.model")
        self._max_tokens = settings.max_tokens
        self._more: dict[str, Any] = {} if settings.temperature is None else {"temperature": settings.temperature}

    def identity(self) -> JudgeIdentity:
        """Return the judge's name and what the endpoint lists about it; only the name where it lists no models.

        Raises:
            MachineError: the endpoint cannot be reached, or does not answer in OpenAI's form.
            SettingError: the endpoint rejects the key.
        """
        return JudgeIdentity(model=self.model, served=self.listed().get(self.model, {}))

    def ask(self, messages: Messages) -> Ask:
        """Send the messages to the judge and return its reply.

        Raises:
            MachineError: the endpoint cannot be reached, is too slow, too busy or fails, in every attempt.
            SettingError: the endpoint rejects the key, or does not serve the model.
            RefusedError: the endpoint refuses this request.
        """
        try:
            made = self.client.chat.completions.create(
                model=self.model,
                messages=list(messages),  # type: ignore[arg-type]
                max_completion_tokens=self._max_tokens,
                **self._more,
            )
            choice = made.choices[0]
            reply, finish, answered_by = choice.message.content or "", choice.finish_reason, made.model
        except FAULTS as error:
            raise self.named(error) from None
        return Ask(
            messages=messages,
            reply=self.clean(reply),
            finish=None if finish is None else self.clean(finish),
            answered_by=self.clean(answered_by or ""),
        )
