"""Failed HTTP downloads: the reason, whether the error can pass, and how long to wait."""

import math
import re
import ssl

import requests
import urllib3

_LONGEST_WAIT_SECONDS = 30  # limit of what a server can request
_PASSING_STATUS = (408, 425, 429)  # in addition to server errors, 500 and above


def requested_wait(error: requests.RequestException) -> int:
    """The seconds that the server requests to wait before the next try, within bounds."""
    headers = {} if error.response is None else error.response.headers
    try:
        seconds = urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0"))
    except urllib3.exceptions.InvalidHeader:
        return 0
    return min(math.ceil(seconds), _LONGEST_WAIT_SECONDS)


def explain(error: requests.RequestException) -> tuple[str, bool]:
    """The reason for a failed download, without the address, and whether the error can pass."""
    if isinstance(error, requests.TooManyRedirects):
        return "too many redirects", False
    cause = _innermost(error)
    proxy = "the proxy: " if isinstance(error, requests.exceptions.ProxyError) else ""
    tunnel = re.search(r"Tunnel connection failed: (\d+)", str(cause))
    status = int(tunnel[1]) if tunnel else getattr(error.response, "status_code", None)
    if status is not None:
        return f"{proxy}HTTP {status}", status >= 500 or status in _PASSING_STATUS
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"{proxy}its certificate is not trusted: {cause.verify_message}; set "
            f"REQUESTS_CA_BUNDLE to a file with the certificates to trust",
            False,
        )
    if isinstance(error, requests.exceptions.InvalidSchema):
        is_socks = "SOCKS" in str(error)
        redirect = "it redirects to an address that is not HTTP"
        return "SOCKS proxies are not supported" if is_socks else redirect, False
    if isinstance(
        cause, (requests.exceptions.InvalidProxyURL, urllib3.exceptions.URLSchemeUnknown)
    ):
        return "the proxy's address is not valid", False
    if isinstance(cause, ValueError):
        return "the address is not valid", False
    if isinstance(cause, TimeoutError) or isinstance(error, requests.Timeout):
        return f"{proxy}no answer in time", True
    passes = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
    if isinstance(error, requests.exceptions.SSLError) or isinstance(cause, ssl.SSLError):
        passes = isinstance(cause, (ssl.SSLEOFError, ConnectionError))
    return f"{proxy}{getattr(cause, 'strerror', None) or cause or type(cause).__name__}", passes


def _innermost(error: BaseException) -> BaseException:
    """The error that the HTTP library has wrapped, as an argument, an attribute or a cause."""
    inner = [getattr(error, "reason", None), *error.args, error.__cause__]
    for one in inner:
        if isinstance(one, BaseException):
            return _innermost(one)
    return error
