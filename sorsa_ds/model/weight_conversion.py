"""Where each parameter of a model lies in its files, and how it is made where it is not one tensor of theirs.

Most mixtures of experts are stored with a tensor for every expert and projection, and transformers holds a layer's
experts as one parameter. Which stored tensors make which parameter, and by which operations, is transformers' own
knowledge (`transformers.conversion_mapping`): the same operations are run here on the tensors of one group at a time.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What transformers' operations ask of a model. It stays as it was before any layer is replaced.

    parameters: the parameters and persistent buffers by name, without memory.
    """

    config: PreTrainedConfig
    parameters: dict[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        """The parameter of that name, of which only the shape is looked at."""
        return self.parameters[name]


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """A group of stored tensors, and the parameters that they become.

    converter: transformers' operations, with the patterns of the names on both sides.
    first: the name of the first of the parameters; most groups have one.
    stored: pattern of the stored names -> the names that match it, in the order in which they are merged.
    shapes: stored name -> its shape in the files.
    """

    converter: WeightConverter
    first: str
    stored: dict[str, list[str]]
    shapes: dict[str, torch.Size]
    facts: ModelFacts

    @property
    def names(self) -> list[str]:
        """The names of all stored tensors of the group."""
        return [name for names in self.stored.values() for name in names]

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that the group becomes, in the order of the converter's patterns."""
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern, 1) for pattern in patterns]

    def convert(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the parameters, by name.

        Args:
            read: gives a stored tensor.
        """
        made = self._run(self.converter, {pattern: [*map(read, names)] for pattern, names in self.stored.items()})
        return {name: made[key] for name, key in zip(self.parameters, self.converter.target_patterns, strict=True)}

    def converted_shapes(self) -> dict[str, torch.Size]:
        """The shapes that the parameters will have, by name; nothing is read.

        Raises:
            ValueError: the stored tensors do not go together.
        """
        try:
            made = self.convert(lambda name: torch.empty(self.shapes[name], device="meta"))
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{self.first} cannot be made of {self.told}: {error}") from error
        return {name: tensor.shape for name, tensor in made.items()}

    def revert(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the stored tensors of the parameters again, by name; `convert` of them gives the parameters.

        Args:
            parameters: all of `self.parameters`, in one dtype, on the CPU. The dictionary is emptied.
        """
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in parameters.items()}
        if {name: tensor.shape for name, tensor in self._reverted(empty).items()} == self.shapes:
            return self._reverted(parameters)
        return self._put_back(parameters)

    @property
    def told(self) -> str:
        """The stored tensors in a few words, and which of the converter's patterns has none."""
        first, others = self.names[0], len(self.names) - 1
        absent = [pattern for pattern in self.converter.source_patterns if pattern not in self.stored]
        told = f"{first} {[*self.shapes[first]]}" + (f" and {others} more" if others else "")
        return told + "".join(f" and nothing that matches {pattern}" for pattern in absent)

    @property
    def gaps(self) -> list[str]:
        """Names of tensors that must be missing: other experts, or the same one in other projections, are there."""
        found = {pattern: _numbered(pattern, names) for pattern, names in self.stored.items() if "*" in pattern}
        count = max((number + 1 for names in found.values() for number in names), default=0)
        return [
            _with_number(pattern, next(iter(names.values())), number)
            for pattern, names in found.items() if names
            for number in range(count) if number not in names
        ]  # fmt: skip

    def _reverted(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """What transformers' reverse operations make: the stored tensors, or fewer, or such of other shapes.

        They cut a concatenation into equal parts, and leave untransposed what was transposed for its shape alone.
        """
        reverse = self.converter.reverse_transform()
        assert isinstance(reverse, WeightConverter)
        names = dict(zip(self.parameters, reverse.source_patterns, strict=True))
        made = self._run(reverse, {names[name]: [parameters.pop(name)] for name in list(parameters)})
        ours = zip(self.converter.source_patterns, reverse.target_patterns, strict=True)
        keys = {
            name: pattern.replace("*", str(number))
            for own, pattern in ours
            for number, name in enumerate(self.stored.get(own, []))
        }
        return {name: made[key] for name, key in keys.items() if key in made}

    def _put_back(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put every number where it came from, whatever the operations are, as long as they only move numbers.

        The stored tensors' places are numbered, and the numbers converted. This takes eight bytes per weight besides.
        """
        sizes = [self.shapes[name].numel() for name in self.names]
        places = dict(zip(self.names, torch.arange(sum(sizes)).split(sizes), strict=True))
        flat = torch.empty(sum(sizes), dtype=next(iter(parameters.values())).dtype)
        for name, place in self.convert(lambda name: places[name].view(self.shapes[name])).items():
            flat[place.reshape(-1)] = parameters.pop(name).reshape(-1)
        return {name: part.view(self.shapes[name]) for name, part in zip(self.names, flat.split(sizes), strict=True)}

    def _run(self, converter: WeightConverter, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """Run operations on tensors by pattern, as transformers does, and leave the patterns as names."""
        for operation in converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.first,
                model=self.facts,
                config=self.facts.config,
                missing_keys=None,
            )
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in tensors.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where a parameter of a model comes from.

    parameter: its name; of tied parameters, the name of the one that is stored.
    stored: the names in the files of the tensors that it is made of.
    conversion: how it is made of them; None where it is the one stored tensor as it is.
    """

    parameter: str
    stored: tuple[str, ...]
    conversion: Conversion | None = None


def find_origins(model: PreTrainedModel, shapes: dict[str, torch.Size]) -> dict[str, Origin]:
    """The origin of every parameter and persistent buffer of a model for which something is stored.

    Args:
        shapes: stored name -> shape.

    Raises:
        ValueError: two stored tensors are the same parameter.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    facts = ModelFacts(model.config, model.state_dict())
    prefix, known = model.base_model_prefix, facts.parameters
    found: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(shapes, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # it has the model's own name already
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known:
            found.setdefault(name, {}).setdefault(pattern, []).append(key)
    origins: dict[str, Origin] = {}
    for name, groups in found.items():
        plain = groups.pop(None, [])
        if plain and (others := [*plain[1:], *_flat(groups.values())]):
            raise ValueError(f"{name} is stored twice, as {plain[0]} and as {others[0]}; remove the one not meant")
        if plain:
            origins[name] = Origin(name, (plain[0],))
            continue
        stored = {pattern: keys for pattern, keys in groups.items() if pattern is not None}
        converter, names = by_pattern[next(iter(stored))], _flat(stored.values())
        conversion = Conversion(converter, name, stored, {key: shapes[key] for key in names}, facts)
        origins |= {made: Origin(made, tuple(names), conversion) for made in conversion.parameters}
    return origins


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [name for names in lists for name in names]


def _numbered(pattern: str, names: list[str]) -> dict[int, str]:
    """The names by the number that stands for the pattern's asterisk; those without one are left out."""
    found = ((re.search(_number(pattern), name), name) for name in names)
    return {int(match[1]): name for match, name in found if match}


def _with_number(pattern: str, name: str, number: int) -> str:
    """A name with another number in the place of the pattern's asterisk."""
    match = re.search(_number(pattern), name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"


def _number(pattern: str) -> str:
    return r"(\d+)" + pattern.partition("*")[2]
