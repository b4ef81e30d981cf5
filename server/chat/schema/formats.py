"""Regular expressions for the formats of JSON Schema that are enforced; any other format only describes.

Each matches values that every common validator accepts, and is bounded: dates exist, years have four digits, there are
no leap seconds, host names are ASCII.
"""

from __future__ import annotations

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_N = "[0-9]{1,4}"
_HOURS = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DAYS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]{1,4}"
_LABEL = "[a-zA-Z0-9]{1,15}(?:-[a-zA-Z0-9]{1,15}){0,2}"
_DOMAIN = rf"(?:{_LABEL}\.){{1,3}}[a-zA-Z]{{2,10}}"
_ATOM = "[a-zA-Z0-9_+-]{1,20}"
_URI_TEXT = r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@\x{2f}-]|%[0-9a-fA-F]{2})"
_POINTER = r"(?:\x{2f}(?:[^~\x{2f}]|~[01])*)*"
_IPV6 = [f"(?:{_HEX}:){{7}}{_HEX}", f"::(?:{_HEX}(?::{_HEX}){{0,6}})?", f"(?:{_HEX}:){{7}}:"]
_IPV6 += [f"(?:{_HEX}:){{{n}}}(?::{_HEX}){{1,{7 - n}}}" for n in range(1, 7)]
_IPV6 += [f"(?:{_HEX}:){{1,6}}:"]

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|{_N}W)",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "|".join(_IPV6),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "hostname": rf"(?:{_LABEL}\.){{0,3}}[a-zA-Z]{{1,15}}(?:-[a-zA-Z0-9]{{1,15}}){{0,2}}",
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@{_DOMAIN}",
    "uri": rf"(?:https?|ftp|wss?):\x{{2f}}\x{{2f}}(?:{_DOMAIN}|localhost|{_BYTE}(?:\.{_BYTE}){{3}})"
    rf"(?::[1-9][0-9]{{0,3}})?(?:\x{{2f}}{_URI_TEXT}*)?(?:\?{_URI_TEXT}*)?(?:#{_URI_TEXT}*)?|(?:urn:[a-z][a-z0-9]{{1,9}}|mailto|tel):{_URI_TEXT}+",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]{{0,3}})(?:#|{_POINTER})",
}
FORMATS |= {"idn-email": FORMATS["email"], "idn-hostname": FORMATS["hostname"], "iri": FORMATS["uri"]}
_X = "[0-9a-fA-F]"
FORMATS |= {f"uuid{n}": f"{_X}{{8}}-{_X}{{4}}-{n}{_X}{{3}}-[89abAB]{_X}{{3}}-{_X}{{12}}" for n in (1, 3, 4, 5, 6, 7, 8)}
