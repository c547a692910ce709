"""An OpenAI-compatible endpoint that is asked one question at a time. What goes wrong is one line."""

from dataclasses import dataclass, field
from typing import Any

from hafs_jax.base.errors import UserError

RETRIES = 6  # of a request that is refused for its rate, or by an overloaded server; the client waits in between
TIMEOUT = 120.0  # seconds

Messages = list[dict[str, str]]


@dataclass
class Endpoint:
    """The model `model` at `url`, such as http://localhost:11434/v1; `key` may be empty, as local servers need none."""

    url: str
    model: str
    key: str = ""
    retries: int = RETRIES
    _client: Any = field(default=None, repr=False)

    def ask(self, messages: Messages, most_tokens: int) -> str:
        """The model's answer, without spaces at its ends.

        `UserError` where the server is not reached, refuses the key, does not know the model, or refuses the request's
        rate after all retries.
        """
        import openai

        if self._client is None:
            self._client = openai.OpenAI(
                base_url=self.url, api_key=self.key or "none", max_retries=self.retries, timeout=TIMEOUT
            )
        try:
            found = self._client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=most_tokens, temperature=0
            )
            return (found.choices[0].message.content or "").strip()
        except openai.RateLimitError:
            raise self._error(
                f"still refuses the rate of requests after {self.retries} retries; the same command goes on later"
            ) from None
        except openai.APIStatusError as error:
            refused = {
                401: "refuses the key",
                403: "refuses the key",
                404: f"has no model {self.model!r} or no such path",
            }
            said = refused.get(error.status_code, f"answers {error.status_code}")
            raise self._error(f"{said}: {' '.join(error.message.split())[:200]}") from None
        except openai.APIConnectionError as error:
            why = error.__cause__ or error
            raise self._error(f"cannot be reached ({why}); start it or give another address") from None
        except (openai.OpenAIError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise self._error(f"gave no answer of the OpenAI form ({type(error).__name__})") from None

    def _error(self, text: str) -> UserError:
        return UserError(f"--endpoint {self.url} {text}")
