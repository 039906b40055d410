"""Final weights of small random networks, for tests of evaluation."""

from pathlib import Path

from orchestrator.checkpoint import checkpoint
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model
from orchestrator.recipe.config import Recipe
from tests.support.launched import recipe


def small(size: int = 16, width: float = 0.05, name: str = "small") -> Recipe:
    """A recipe of a network that runs in milliseconds."""
    return recipe(name, model={"kind": "googlenet", "image_size": size, "width": width})


def save(folder: Path, of: Recipe, classes: tuple[str, ...], seed: int) -> tuple[str, Network]:
    """The URL of final weights, and the network that has them."""
    model = create_model(of.model, len(classes), seed).eval()
    model.drop_auxiliary()
    # As built, a network says nearly the same of every image: larger weights make scores that differ.
    state = {name: value * 3 if name == "classifier.weight" else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    raw = {name: value + 1 for name, value in state.items()}  # must not be what is scored
    checkpoint.save_final_weights(str(folder / "final"), state, raw, of.to_dict(), classes)
    return str(folder / "final"), model
