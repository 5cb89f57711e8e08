"""The URLs of Redis: those that are accepted, and the message of each refusal."""

from __future__ import annotations

import pytest

from worker.redis_url import RedisUrl, read_redis_url
from worker.settings import BadSettings, read_settings


@pytest.mark.parametrize(
    ("url", "rendered", "shown"),
    [
        ("redis://h", "redis://h:6379/0", "redis://h:6379/0"),
        ("redis://u:p@h:1/2", "redis://u:p@h:1/2", "redis://h:1/2"),
        ("redis://:a%2Fb%3B%40@h", "redis://:a%2Fb%3B%40@h:6379/0", "redis://h:6379/0"),
        ("redis://[::1]:7/3", "redis://[::1]:7/3", "redis://[::1]:7/3"),
        ("rediss://h/0?ssl_cert_reqs=required", "rediss://h:6379/0", "rediss://h:6379/0"),
        ("redis+socket:///a/b.sock", "redis+socket:///a/b.sock?virtual_host=0", "redis+socket:///a/b.sock"),
        ("redis+socket:///a?virtual_host=2", "redis+socket:///a?virtual_host=2", "redis+socket:///a"),
        ("redis+socket:///a?password=p%2F", "redis+socket://:p%2F@/a?virtual_host=0", "redis+socket:///a"),
        ("sentinel://:p@a?master_name=m", "sentinel://:p@a:26379/0", "sentinel://a:26379/0"),
        (
            "sentinel://:p@a/1;sentinel://b:2/1",
            "sentinel://:p@a:26379/1;sentinel://:p@b:2/1",
            "sentinel://a:26379/1;sentinel://b:2/1",
        ),
    ],
)
def test_url_is_parsed_and_formatted_for_kombu_and_celery(url: str, rendered: str, shown: str) -> None:
    assert read_redis_url(url).render() == rendered
    assert read_redis_url(url).shown() == shown


def test_password_of_a_file_is_used_where_the_url_has_none() -> None:
    assert read_redis_url("redis://h").render("p/w") == "redis://:p%2Fw@h:6379/0"
    assert read_redis_url("redis://u@h").render("p") == "redis://u:p@h:6379/0"
    assert read_redis_url("redis://:own@h").render("p") == "redis://:own@h:6379/0"
    assert read_redis_url("sentinel://a;sentinel://b").render("p") == "sentinel://:p@a:26379/0;sentinel://:p@b:26379/0"
    assert read_redis_url("redis+socket:///s").render("p") == "redis+socket://:p@/s?virtual_host=0"


def test_files_of_tls_are_passed_to_the_connection() -> None:
    read = read_redis_url("rediss://h/0?ssl_certfile=%2Fa%20b&ssl_keyfile=/k")

    assert read == RedisUrl(
        "rediss", (("h", 6379),), "", "", "", 0, "", (("ssl_certfile", "/a b"), ("ssl_keyfile", "/k"))
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3cret", "no scheme"),
        ("localhost:6379", "no scheme"),
        ("amqp://:s3cret@h", "scheme must be one of redis"),
        ("REDIS://h", "scheme must be one of redis"),
        ("unix:///s", r"redis\+socket:///path"),
        ("redis+socket://s3cret/b.sock", r"redis\+socket:///path"),
        ("redis+socket:///", r"redis\+socket:///path"),
        ("redis+socket:///s?db=1", "option after the"),
        ("redis://", "host is missing"),
        ("redis:///0", "host is missing"),
        ("redis://:s3cret@:6379/0", "host is missing"),
        ("redis://h:port/0", "port must be a number"),
        ("redis://h:0/0", "port must be a number"),
        ("redis://h:65536/0", "port must be a number"),
        ("redis://h:6379/abc", "database"),
        ("redis://h:6379/-1", "database"),
        ("redis://h:6379/0/1", "database"),
        ("redis://h:6379/%31/", "database"),
        ("redis://::1:6379/0", "in brackets"),
        ("redis://[::1/0", "in brackets"),
        ("redis://[::1]6379/0", "in brackets"),
        ("redis://[h]:6379/0", "in brackets"),
        ("redis://:s3cret@a/0;redis://:s3cret@b/0", "sentinels only"),
        ("sentinel://:s3cret@a;redis://:s3cret@b", "sentinels only"),
        ("sentinel://:s3cret@a;sentinel://:another@b", "differ in the password"),
        ("sentinel://a/1;sentinel://b/2", "differ in the database"),
        ("redis://:s3;cret@h/0", "sentinels only"),
        ("redis://:s3cret/word@h/0", "%2F"),
        ("redis://:s3cret?word@h/0", "%XX"),
        ("redis://:s3cret#word@h/0", "%XX"),
        ("redis://:s3cret@word@h/0", "more than one @"),
        ("redis://:s3cret%@h/0", "%25"),
        ("redis://:s3cret%ff@h/0", "UTF-8"),
        ("redis://:s3cret\N{LATIN SMALL LETTER E WITH ACUTE}@h/0", "ASCII"),
        ("redis://:s3cret @h/0", "blanks"),
        ("redis://h/0\n", "blanks"),
        ('"redis://h/0"', "scheme must be one of redis"),
        ("redis://h/0?password=s3cret", "option after the"),
        ("redis://h/0?credential_provider=os:system", "option after the"),
        ("redis://h/0?ssl_cert_reqs=none", "option after the"),
        ("redis://h/0?virtual_host=1", "option after the"),
        ("redis://h/0?socket_timeout=1&socket_timeout=2", "repeated"),
        ("rediss://h/0?ssl_cert_reqs=none", "ssl_cert_reqs"),
        ("rediss://h/0?ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs"),
        ("rediss://h/0?ssl_cert_reqs=optional", "ssl_cert_reqs"),
        ("rediss://h/0?ssl_cert_reqs=", "ssl_cert_reqs"),
        ("rediss://h/0?ssl_check_hostname=false", "ssl_check_hostname"),
        ("rediss://h/0?ssl_check_hostname=0", "ssl_check_hostname"),
        ("rediss://h/0?ssl_min_version=1", "option after the"),
    ],
)
@pytest.mark.parametrize("setting", ["broker_url", "result_backend"])
def test_invalid_url_is_refused_in_one_line_without_its_password(setting: str, url: str, reason: str) -> None:
    with pytest.raises(BadSettings, match=reason) as raised:
        read_settings(**{setting: url})

    message = str(raised.value)
    assert message.startswith(f"FORKVM_{setting.upper()}: ")
    assert "\n" not in message
    assert "s3cret" not in message


def test_sentinels_need_the_name_of_the_master() -> None:
    with pytest.raises(BadSettings, match=r"^FORKVM_BROKER_URL: .*FORKVM_SENTINEL_MASTER"):
        read_settings(broker_url="sentinel://h:26379")

    assert read_settings(broker_url="sentinel://h:26379", sentinel_master="m").backend.scheme == "sentinel"


def test_files_in_a_url_must_be_readable() -> None:
    with pytest.raises(BadSettings, match=r"^FORKVM_BROKER_URL: ssl_ca_certs"):
        read_settings(broker_url="rediss://h?ssl_ca_certs=/nonexistent/ca.pem")
