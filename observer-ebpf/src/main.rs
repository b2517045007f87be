#![no_std]
#![no_main]
use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};
#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn inet_sock_set_state(_ctx: BtfTracePointContext) -> i32 {
    0
}
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
