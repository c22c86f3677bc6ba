//! The relay and its clients over loopback: what a user of the crate sees.
#![cfg(test)]

#[cfg(feature = "verify")]
mod admission;
mod attacks;
mod checklist;
mod clients;
mod dialling;
mod faults;
mod harness;
mod http;
mod limits;
mod listener;
mod moving;
mod overload;
mod proxy;
mod region;
mod restart;
mod websocket;
