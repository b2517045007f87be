//! Empty: it exists so that the daemon can name this package as a build dependency and be rebuilt
//! when the programs change.

#![no_std]
