"""Parameters that were trained whole, as PEFT keeps them in an adapter: `modules_to_save`, each a whole module.

A parameter that is tied stands there under each of its names, since PEFT unties what it saves.
"""

from dataclasses import dataclass

from sorsa_ds.run.source import Source


@dataclass(frozen=True, slots=True)
class ModulesToSave:
    """What PEFT saves beside adapters.

    modules: their full names, in module order.
    parameters: name in the model -> the first name of that parameter.
    """

    modules: list[str]
    parameters: dict[str, str]


def modules_to_save(source: Source) -> ModulesToSave:
    """The modules that hold what was trained whole. One that lies within another goes with it.

    Raises:
        ValueError: PEFT, which looks at how names end, would take a module for another, or one holds adapted linears.
    """
    wanted = {module for one in source.whole for module in one.modules}
    names = [name for name, _ in source.model.named_modules(remove_duplicate=False)]
    modules = [name for name in names if name in wanted and not any(name.startswith(f"{up}.") for up in wanted)]
    for module in modules:
        inside = tuple(f"{one}." for one in modules)
        also = [name for name in names if name.endswith(module) and name not in modules and not name.startswith(inside)]
        also += [target.name for target in source.targets if target.name.startswith(f"{module}.")]
        if also:
            raise ValueError(
                f"{module} was trained whole, and PEFT cannot save it without {also[0]}, which was not; "
                f"--format merged has it"
            )
    first: dict[int, str] = {}
    parameters = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in source.model.named_parameters(remove_duplicate=False)
    }
    inside = tuple(f"{module}." for module in modules)
    return ModulesToSave(modules, {name: one for name, one in parameters.items() if name.startswith(inside)})
