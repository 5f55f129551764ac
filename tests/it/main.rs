mod admin;
mod config;
