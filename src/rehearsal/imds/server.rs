//! The HTTP of it.

use std::time::Duration;

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use tokio_util::sync::CancellationToken;

use super::{
    bodies::error_page,
    world::{Control, Fault},
};

const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The lifetimes that can be asked for, in seconds ("Use the Instance Metadata Service").
const TOKEN_TTLS: std::ops::RangeInclusive<u64> = 1..=21_600;

#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) control: Control,
    pub(super) cancel: CancellationToken,
}

pub(super) fn router(service: Service) -> Router {
    Router::new().fallback(answer).with_state(service)
}

async fn answer(State(service): State<Service>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let Service { control, cancel } = service;
    let Some(path) = below_version(uri.path()) else { return error(StatusCode::NOT_FOUND) };
    let known_as = path.strip_prefix("meta-data/").unwrap_or(path).trim_end_matches('/');
    match control.requested(known_as) {
        Some(Fault::Delay(time)) => {
            let _ = cancel.run_until_cancelled(tokio::time::sleep(time)).await;
        }
        Some(Fault::Status(status)) => {
            return error(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
        }
        Some(Fault::Body(body)) => return text(body),
        None => {}
    }
    match (&method, path) {
        (&Method::PUT, "api/token") => give_token(&control, &headers),
        (_, "api/token") => error(StatusCode::METHOD_NOT_ALLOWED),
        (&Method::GET | &Method::HEAD, _) => read(&control, path, &headers),
        _ => error(StatusCode::METHOD_NOT_ALLOWED),
    }
}

/// What comes after `/latest/`, or after a dated version like `/2021-07-15/`, which is answered like the latest.
fn below_version(path: &str) -> Option<&str> {
    let (version, below) = path.strip_prefix('/')?.split_once('/').unwrap_or((path.trim_start_matches('/'), ""));
    let dated = version.len() == 10 && version.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    (version == "latest" || dated).then_some(below)
}

fn give_token(control: &Control, headers: &HeaderMap) -> Response {
    // A request that came through a proxy gets no token: this is how IMDSv2 stops open proxies.
    if headers.contains_key(FORWARDED_FOR) {
        return error(StatusCode::FORBIDDEN);
    }
    let asked = headers.get(TOKEN_TTL).and_then(|value| value.to_str().ok()?.parse().ok());
    let Some(seconds) = asked.filter(|seconds| TOKEN_TTLS.contains(seconds)) else {
        return error(StatusCode::BAD_REQUEST);
    };
    let (token, ttl) = control.new_token(Duration::from_secs(seconds));
    ([(TOKEN_TTL, ttl.as_secs().to_string())], text(token)).into_response()
}

fn read(control: &Control, path: &str, headers: &HeaderMap) -> Response {
    let token = headers.get(TOKEN).and_then(|value| value.to_str().ok());
    let Some(left) = token.and_then(|token| control.token_left(token)) else {
        return error(StatusCode::UNAUTHORIZED);
    };
    let body = match path.trim_end_matches('/') {
        "" => Some("dynamic\nmeta-data".to_owned()),
        "dynamic" => Some("instance-identity/".to_owned()),
        "dynamic/instance-identity" => Some("document".to_owned()),
        "dynamic/instance-identity/document" => Some(control.identity_document().to_owned()),
        "meta-data" => control.body(""),
        other => other.strip_prefix("meta-data/").and_then(|path| control.body(path)),
    };
    match body {
        Some(body) => ([(TOKEN_TTL, left.as_secs().to_string())], text(body)).into_response(),
        None => error(StatusCode::NOT_FOUND),
    }
}

fn text(body: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain"), (header::SERVER, "EC2ws")], body).into_response()
}

fn error(status: StatusCode) -> Response {
    let page = error_page(status.as_u16(), status.canonical_reason().unwrap_or("Error"));
    (status, [(header::CONTENT_TYPE, "text/html"), (header::SERVER, "EC2ws")], page).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(below_version("/latest/meta-data/mac"), Some("meta-data/mac"));
        assert_eq!(below_version("/2021-07-15/meta-data/mac"), Some("meta-data/mac"));
        assert_eq!(below_version("/latest"), Some(""));
        assert_eq!(below_version("/newest/meta-data/mac"), None);
        assert_eq!(below_version("/"), None);
    }
}
