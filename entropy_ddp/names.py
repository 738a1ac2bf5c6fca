"""Parameters' names as people read them."""


def short_name(parameter: str) -> str:
    """A parameter's name without what PEFT wraps around every one of them."""
    for wrapping in ("base_model.model.", "model.", "transformer."):
        parameter = parameter.removeprefix(wrapping)
    return parameter.removesuffix(".weight").removesuffix(".default")
