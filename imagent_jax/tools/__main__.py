"""`python -m imagent_jax.tools [NAME ...]`: what tools do, their arguments and their own settings. NAME as in `tools.names`."""

import sys

from imagent_jax.config.own import lines
from imagent_jax.tools import VISUAL_TOOLS, tools_by_name


def main(names: list[str]) -> int:
    """Print the tools of these names (default: the visual tools). Exit code 2: there is no such tool."""
    try:
        tools = tools_by_name(names or [*VISUAL_TOOLS])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for item, schema in zip(tools, tools.schemas(), strict=True):
        function = schema["function"]
        print(f"{item.name}: {function['description']}")
        for name, argument in function["parameters"]["properties"].items():
            print(f"  {name}: {argument['type']}{', ' + argument['description'] if 'description' in argument else ''}")
        print("".join(f"  tools.settings.{item.name}.{line}\n" for line in lines(item.settings)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
