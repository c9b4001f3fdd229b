"""What the cards of TensorBoard show: their tags, which order them, their titles and their descriptions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vae_cli.config.claims import entry
from vae_cli.config.objective import MEASURED, TERMS

# What a point of a loss curve is, for the description of its card.
POINT = {
    "train": "Each point is the mean over the training steps since the point before it.",
    "validation": "Each point is the mean over the validation images after an epoch.",
}


def tag_of(name: str) -> str:
    """Return the tag of a figure that metrics.jsonl calls `name`.

    TensorBoard sorts cards by tag and groups them by the first part. So the loss terms come first, the training curve
    of each next to its validation curve. The other validation figures describe the posterior.

    >>> tag_of("train/loss"), tag_of("validation/loss")
    ('curves/loss/train', 'curves/loss/validation')
    >>> tag_of("validation/active_units"), tag_of("test/loss")
    ('posterior/active_units', 'test/loss')
    """
    split, _, figure = name.partition("/")
    if split not in ("train", "validation"):
        return name
    # Regularizers add terms of their own, so the loss terms are those that no list of posterior figures names.
    is_term = figure in TERMS or figure not in MEASURED
    return f"curves/{figure}/{split}" if is_term else f"posterior/{figure}"


def points_of(values: Mapping[str, float], described: Collection[str]) -> Any:
    """Return one summary for all values; SummaryWriter.add_scalar would make one for each.

    Points of tags in `described` include the title and definition of the figure, which TensorBoard reads from the first
    point of a tag.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(
        value=[
            Summary.Value(tag=tag, simple_value=value, metadata=_description(tag) if tag in described else None)
            for tag, value in values.items()
        ]
    )


def _description(tag: str) -> Any:
    """Return the title and description that TensorBoard shows with a curve; None if no definition is registered."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR

    group, _, rest = tag.partition("/")
    name, _, split = rest.partition("/") if group == "curves" else (rest, "", "")
    figure = entry(name)
    if not figure.definition:
        return None
    title = f"{figure.title} ({split})" if split else figure.title
    parts = [figure.definition, f"`{figure.formula}`" if figure.formula else "", figure.unit, POINT.get(split, "")]
    return describe("scalars", DATA_CLASS_SCALAR, title, "\n\n".join(filter(None, parts)))


def describe(plugin: str, data_class: int, title: str, description: str) -> Any:
    """Return the title and description of a card.

    TensorBoard's data server keeps them only if the plugin and the class of the data are named too.
    """
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata

    return SummaryMetadata(
        display_name=title,
        summary_description=description,
        plugin_data=SummaryMetadata.PluginData(plugin_name=plugin),
        data_class=data_class,
    )


def page(tag: str, text: str) -> Any:
    """Return a page of the Text tab, from Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text import metadata

    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto())
    content = metadata.create_summary_metadata("", "").plugin_data
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=content), tensor=tensor)
