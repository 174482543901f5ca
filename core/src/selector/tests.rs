use crate::cpuset::CpuSet;
use crate::sysroot::Sysroot;

use super::*;

fn read(text: &str) -> std::result::Result<String, String> {
    text.parse::<Selector>()
        .map(|expr| expr.to_string())
        .map_err(|error| error.to_string())
}

#[test]
fn good_ones_are_printed_in_one_form() {
    for (text, printed) in [
        ("0-5,12-17", "0-5,12-17"),
        ("5,4,3\n", "3-5"),
        ("llc:1", "llc:1"),
        ("ccd:1", "llc:1"),
        ("ccx:0-1,3", "llc:0-1,3"),
        ("L3:1", "llc:1"),
        ("socket:0", "package:0"),
        ("numa:2", "node:2"),
        ("die:0", "die:0"),
        ("core:6", "core:6"),
        ("smt:6-11", "smt:6-11"),
        ("vm:100,101", "vm:100,101"),
        ("cpu:5,4", "4-5"),
        ("online", "online"),
        ("First-Threads", "first-threads"),
        (" llc : 1 & ! 6 \n", "llc:1&!6"),
        ("!6-11,18-23", "!6-11,18-23"),
        ("!!llc:0", "!!llc:0"),
        ("0-5,llc:1", "0-5,llc:1"),
        ("0-2,cpu:4,5", "0-2,4-5"),
        ("llc:1,cpu:0", "llc:1,cpu:0"),
        ("llc:1,0", "llc:0-1"),
        ("vm:100,cpu:7", "vm:100,cpu:7"),
        ("online,5", "online,5"),
        ("llc:1,!6,18", "llc:1,!6,18"),
        ("llc:1,!6,cpu:18", "llc:1,!6,cpu:18"),
        ("llc:0&0-2,5", "llc:0&0-2,5"),
        ("(llc:0,llc:1)&first-threads", "(llc:0,llc:1)&first-threads"),
        ("llc:1,(!6&!7)", "llc:1,(!6&!7)"),
        ("!(0)", "!(0)"),
        ("((((((((((0))))))))))", "((((((((((0))))))))))"),
    ] {
        assert_eq!(read(text).as_deref(), Ok(printed), "{text:?}");
        assert_eq!(read(printed).as_deref(), Ok(printed));
    }
}

#[test]
fn plain_lists_keep_their_words() {
    for text in [
        "", "\n", "5-3", "1,,2", "1,x", "x", "-1", "1-2-3", "+1", "8192", "0x3", "0-5;12", "0 1",
        "é", "1,é",
    ] {
        let list = text.parse::<CpuSet>().unwrap_err().to_string();
        assert_eq!(read(text), Err(list), "{text:?}");
    }
}

#[test]
fn bad_ones_name_the_token_and_its_place() {
    for (text, message) in [
        (
            "lcl:1",
            "\"lcl\" in \"lcl:1\" (character 1) is not a selector; selectors are llc:N, ",
        ),
        (
            "0-5,vcash",
            "\"vcash\" in \"0-5,vcash\" (character 5) is not a selector; selectors are ",
        ),
        ("llc", "\"llc\" needs a number after it, as in llc:0"),
        ("vm", "\"vm\" needs a number after it, as in vm:100"),
        (
            "llc:",
            "\"\" in \"llc:\" (character 5) is not a number or range; write as in 0 or 0-1",
        ),
        (
            "llc:x",
            "\"x\" in \"llc:x\" (character 5) is not a number or range; ",
        ),
        (
            "llc:-1",
            "\"-1\" in \"llc:-1\" (character 5) is not a number or range; ",
        ),
        (
            "llc:3-1",
            "\"3-1\" in \"llc:3-1\" (character 5) runs backwards; did you mean 1-3?",
        ),
        (
            "llc:0,9-2",
            "\"9-2\" in \"llc:0,9-2\" (character 7) runs backwards; did you mean 2-9?",
        ),
        (
            "node:8192",
            "\"8192\" in \"node:8192\" (character 6) is beyond 8191, the largest number allowed",
        ),
        (
            "cpu:x",
            "\"x\" in \"cpu:x\" (character 5) is not a CPU number or range; write CPUs as in cpu:0-5,12",
        ),
        (
            "vm:99",
            "\"99\" in \"vm:99\" (character 4) is not a VM number (100 to 999999999); ",
        ),
        (
            "vm:100-102",
            "\"100-102\" in \"vm:100-102\" (character 4) is not a VM number ",
        ),
        (
            "vm:0100",
            "\"0100\" in \"vm:0100\" (character 4) is not a VM number ",
        ),
        (
            "online:1",
            "\"online:\" in \"online:1\" (character 1) does not take a number; write only online",
        ),
        (
            "llc:0,",
            "\"\" in \"llc:0,\" (character 7) is not a CPU number, range or selector; write CPUs as in ",
        ),
        (
            "&llc:0",
            "\"\" in \"&llc:0\" (character 1) is not a CPU number, ",
        ),
        (
            "llc:0&",
            "\"\" in \"llc:0&\" (character 7) is not a CPU number, ",
        ),
        ("!", "\"\" in \"!\" (character 2) is not a CPU number, "),
        ("()", "\"\" in \"()\" (character 2) is not a CPU number, "),
        (
            "0-5,(llc:1",
            "\"(\" in \"0-5,(llc:1\" (character 5) is not closed",
        ),
        (
            "llc:1)",
            "\")\" in \"llc:1)\" (character 6) has no matching \"(\"",
        ),
        (
            "llc:0 llc:1",
            "\"0 llc\" in \"llc:0 llc:1\" (character 5) is not a number or range; ",
        ),
        (
            "online all",
            "\"all\" in \"online all\" (character 8) is not expected here; join CPUs by \",\" or \"&\"",
        ),
        (
            "llc:1!6",
            "\"!6\" in \"llc:1!6\" (character 6) is not expected here; ",
        ),
        (
            "5:3",
            "\":3\" in \"5:3\" (character 2) is not expected here; ",
        ),
        (
            "é&llc:1,",
            "\"é\" in \"é&llc:1,\" (character 1) is not a CPU number, ",
        ),
        (
            "llc:é",
            "\"é\" in \"llc:é\" (character 5) is not a number or range; ",
        ),
        (
            "llc:1,!6&!7",
            "\"!6&!7\" in \"llc:1,!6&!7\" (character 7) is ambiguous here; use parentheses: ",
        ),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.starts_with(message), "{text:?}: {error}");
    }
}

#[test]
fn no_nesting_exhausts_the_stack() {
    for sign in ["!", "("] {
        let error = read(&format!("{}0", sign.repeat(100_000))).unwrap_err();
        assert!(
            error.ends_with("(character 33) is nested too deeply; the limit is 32"),
            "{}",
            &error[error.len() - 100..]
        );
    }
    assert!(read(&format!("{}é", "!".repeat(32))).is_err());
    assert!(read(&"(llc:0),".repeat(10_000)).is_err(), "ends in a comma");
    assert!(read(&format!("{}0", "(llc:0),".repeat(10_000))).is_ok());
}

#[test]
fn settings_take_them_as_text() {
    let read =
        |json: &str| serde_json::from_str::<Selector>(json).map_err(|error| error.to_string());
    let expr = read("\"llc:1&!6\"").unwrap();
    assert_eq!(serde_json::to_string(&expr).unwrap(), "\"llc:1&!6\"");
    assert!(
        read("\"llc\"")
            .unwrap_err()
            .starts_with("\"llc\" needs a number")
    );
    assert_eq!(read("\"\"").unwrap(), CpuSet::new().into(), "as a CpuSet");
}

#[test]
fn vms_are_seen_wherever_they_are_named() {
    for (text, names) in [
        ("vm:100", true),
        ("online&!vm:100", true),
        ("0,(llc:1,!vm:101)", true),
        ("0-5", false),
        ("!llc:1,0", false),
    ] {
        assert_eq!(
            text.parse::<Selector>().unwrap().names_vms(),
            names,
            "{text}"
        );
    }
}

#[test]
fn cpus_that_are_named_by_number() {
    for (text, names) in [
        ("0", true),
        ("0-7,16-23", true),
        ("core:0", true),
        ("llc:1,(smt:0,!4)", true),
        ("llc:0", false),
        ("pcores,!core:0", false),
        ("1-7", false),
        ("vcache", false),
    ] {
        let named = text.parse::<Selector>().unwrap().names_cpu(0);
        assert_eq!(named, names, "{text}");
    }
}

#[test]
fn a_plain_list_asks_the_host_nothing() {
    let nowhere = Sysroot::new("/nonexistent");
    let resolve = |text: &str| {
        text.parse::<Selector>()
            .unwrap()
            .resolve(&nowhere)
            .map(|cpus| cpus.to_string())
    };
    assert_eq!(resolve("0-5,12").unwrap(), "0-5,12");
    assert_eq!(resolve("cpu:7").unwrap(), "7");
    assert!(resolve("online").is_err());
}
