"""The judge behind its endpoint."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.judge.prompts import Messages
from capgap.pipeline.models.endpoint import FAULTS, Endpoint
from capgap.schemas.judge_results import Ask, JudgeIdentity
from capgap.schemas.run_judge import JudgeSettings


class JudgeEndpoint(Endpoint):
    """Asks the judge.

    Raises:
        SettingError: the key holds characters that no key has.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(settings, settings.model, "the judge", "judge", "judge.model")
        self._max_tokens = settings.max_tokens
        self._more: dict[str, Any] = {} if settings.temperature is None else {"temperature": settings.temperature}

    def identity(self) -> JudgeIdentity:
        """Who answers here under the judge's name; without more than the name where the endpoint lists no models.

        Raises:
            MachineError, SettingError: as `listed`.
        """
        return JudgeIdentity(model=self.model, served=self.listed().get(self.model, {}))

    def ask(self, messages: Messages) -> Ask:
        """One reply.

        Raises:
            MachineError: the endpoint cannot be reached, is too slow, too busy or fails, as often as it was asked.
            SettingError: it does not take the key, or has no such model.
            RefusedError: it does not take this request.
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
