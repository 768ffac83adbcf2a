"""The code of a registered version: MLflow runs this file (models from code), so nothing is unpickled.

`mlflow.pyfunc.load_model(uri, model_config={"base": FOLDER})` gives a model that answers prompts. The base is found by
digest: any other than the one that the edit was solved on is refused.
"""

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class DeltaModel(PythonModel):  # type: ignore[misc]
    """A base model, found where `base` says, with the version's delta in force."""

    def load_context(self, context: Any) -> None:
        # The product is asked for late: MLflow runs this file where a version is registered, too.
        from guardedit.pipeline.served import Served

        files = {name: Path(path) for name, path in context.artifacts.items()}
        settings = context.model_config or {}
        self.served = Served(files["plan"], files["delta"], settings.get("base"))
        self.tokens = int(settings.get("tokens", 20))

    def predict(
        self, context: Any, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[str]:
        return [self.served.answer(prompt, self.tokens) for prompt in model_input]


set_model(DeltaModel())
