"""Prints a project's dependencies, one a line: pyproject.toml, then names of extras with commas between them."""

import sys
import tomllib

path, extras = sys.argv[1:]
with open(path, "rb") as file:
    project = tomllib.load(file)["project"]
optional = project["optional-dependencies"]
wanted = [name for name in extras.split(",") if name]
if unknown := sorted(set(wanted) - set(optional)):
    sys.exit(f"EXTRAS {', '.join(unknown)} unknown; allowed are {', '.join(sorted(optional))}")
print(*project["dependencies"], *(line for name in wanted for line in optional[name]), sep="\n")
