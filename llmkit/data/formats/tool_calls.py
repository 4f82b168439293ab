"""Tools, and calls of them, in OpenAI's form: the one that chat templates take.

A structure loses its null entries: Parquet and Arrow give every row the keys of all rows, null where a row has none,
and the same data must give the same tokens from every kind of file. JSON text is kept to the letter.
"""

import json
from typing import Any

from llmkit.data.examples import Tools
from llmkit.data.formats.columns import Misfit, shown

# What may stand beside the name in a call without arguments.
CALL_KEYS = {"id", "type", "index", "name", "arguments", "input", "text", "value"}


def read_tools(value: Any, where: str = "'tools'") -> Tools | None:
    """The tools a row offers, each as {"type": "function", "function": {...}}; None where there are none.

    `value` is a list, or JSON text of one; each tool in OpenAI's form, or its function alone. Raises Misfit.
    """
    if value is None or value == "":
        return None
    tools = parsed(value, where)
    if not isinstance(tools, list):
        raise Misfit(f"{where} must be a list of tools, or JSON text of one, found {shown(value)}.")
    return [_tool(tool, f"{where}, tool {index}") for index, tool in enumerate(tools)] or None


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls in `value`, one or a list, as a structure or JSON text; their arguments as mappings. Raises Misfit."""
    calls = parsed(value, where)
    if not isinstance(calls, list):
        calls = [calls]
    if not calls:
        raise Misfit(f"{where} holds no call.")
    return [_call(call, where) for call in calls]


def parsed(value: Any, where: str) -> Any:
    """JSON text as what it says, a structure without its nulls. Raises Misfit for text that is not JSON."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Misfit(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown(value)}.") from error


def without_nulls(value: Any) -> Any:
    """`value` without the entries of mappings that are null, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parsed(tool, where)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Misfit(f"{where}: a tool is a mapping with a function and its 'name', found {shown(tool)}.")
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": parsed(function["parameters"], f"{where}, 'parameters'")}
    if not isinstance(function.get("parameters", {}), dict):
        raise Misfit(f"{where}: 'parameters' must be a JSON schema, found {shown(function['parameters'])}.")
    if "function" in tool:
        return tool | {"type": "function", "function": function}
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}


def _call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = parsed(call, where)
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Misfit(f"{where}: a call needs a 'name' and 'arguments', found {shown(call)}.")
    name = function["name"]
    arguments = function.get("arguments", function.get("input"))
    if arguments is None and (others := function.keys() - CALL_KEYS):
        raise Misfit(f"{where}: the call of '{name}' has no 'arguments', but {', '.join(sorted(others))}.")
    if isinstance(arguments, str) and arguments:
        arguments = parsed(arguments, f"{where}, arguments of '{name}'")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise Misfit(f"{where}: the arguments of '{name}' must be a mapping, found {shown(arguments)}.")
    own = {"id": call["id"]} if call.get("id") is not None else {}
    return own | {"type": "function", "function": {"name": name, "arguments": arguments}}
