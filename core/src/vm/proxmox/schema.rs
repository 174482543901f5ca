//! The settings that Proxmox VE knows and what it checks of their values when it reads VMID.conf:
//! `$confdesc` and `check_type` in `PVE::QemuServer`, and the formats that are named there.
//!
//! Only types and formats are checked then. A pattern, a minimum or a list of words of a setting
//! itself is not: `cores: 0`, `hugepages: x` and `lock: x` are taken.
//!
//! This is Proxmox VE 9.2. Models of CPUs are not checked, since each release has more of them.

use super::property::{self, Format, Kind, Property, is_digits};
use super::words::is_space;
use crate::text::excerpt;

/// The number of `hostpciN` entries that a VM may have.
pub(super) const MAX_HOSTPCI: u32 = 16;
/// The number of `numaN` entries that a VM may have.
pub(super) const MAX_NUMA: u32 = 8;
/// The number of `virtiofsN` entries that a VM may have.
const MAX_VIRTIOFS: u32 = 10;

/// What the value of a setting is.
enum Type {
    /// [`property::boolean`].
    Boolean,
    /// Digits.
    Integer,
    /// Digits, and a fraction.
    Number,
    /// Anything; double quotes around it are dropped.
    Text,
    /// What a function takes, or why not.
    Checked(fn(&str) -> Result<(), String>),
    /// A property string.
    Properties(&'static Format),
}

/// What is left of the value of a setting when Proxmox VE has checked it.
///
/// # Errors
/// Why it does not take it.
pub(super) fn check<'a>(key: &str, value: &'a str) -> Result<&'a str, String> {
    if value.contains('\r') {
        return Err("a carriage return in the value".into());
    }
    let require = |good: bool, otherwise: &str| good.then_some(value).ok_or(otherwise.to_owned());
    match type_of(key).ok_or("unknown setting")? {
        Type::Boolean => require(property::boolean(value).is_some(), "not a boolean"),
        Type::Integer => require(is_digits(value), "not an integer"),
        Type::Number => {
            let (whole, part) = value.split_once('.').unwrap_or((value, "0"));
            require(is_digits(whole) && is_digits(part), "not a number")
        }
        Type::Text => Ok(value
            .strip_prefix('"')
            .and_then(|value| value.strip_suffix('"'))
            .unwrap_or(value)),
        Type::Checked(check) => check(value).map(|()| value),
        Type::Properties(format) => property::parse(format, value).map(|_| value),
    }
}

/// The same for `[special:fleecing]`, which has a setting of its own.
///
/// # Errors
/// Why Proxmox VE does not take it.
pub(super) fn check_fleecing<'a>(key: &str, value: &'a str) -> Result<&'a str, String> {
    match key {
        "fleecing-images" if list(value).all(is_volume) => Ok(value),
        "fleecing-images" => Err("not a list of volumes".into()),
        _ => Err("unknown setting".into()),
    }
}

fn type_of(key: &str) -> Option<Type> {
    let (name, number) = split_number(key);
    let below = |most: u32| number.is_some_and(|number| number < most);
    Some(match name {
        "numa" if below(MAX_NUMA) => Type::Properties(&NUMA),
        "virtiofs" if below(MAX_VIRTIOFS) => Type::Properties(&VIRTIOFS),
        "net" if below(32) => Type::Properties(&NET),
        "ipconfig" if below(32) => Type::Properties(&IPCONFIG),
        "hostpci" if below(MAX_HOSTPCI) => Type::Properties(&HOSTPCI),
        "usb" if below(14) => Type::Properties(&USB),
        "ide" if below(4) => Type::Properties(&IDE),
        "sata" if below(6) => Type::Properties(&SATA),
        "scsi" if below(31) => Type::Properties(&SCSI),
        "virtio" if below(16) => Type::Properties(&VIRTIO),
        "unused" if below(256) => Type::Properties(&UNUSED),
        "efidisk" if below(1) => Type::Properties(&EFIDISK),
        "tpmstate" if below(1) => Type::Properties(&TPMSTATE),
        "audio" if below(1) => Type::Properties(&AUDIO),
        "rng" if below(1) => Type::Properties(&RNG),
        "serial" if below(4) => Type::Text,
        "parallel" if below(3) => Type::Text,
        _ => return type_of_single(key),
    })
}

fn type_of_single(key: &str) -> Option<Type> {
    Some(match key {
        "onboot" | "autostart" | "reboot" | "numa" | "keephugepages" | "acpi" | "kvm" | "tdf"
        | "localtime" | "freeze" | "template" | "tablet" | "protection" | "ciupgrade"
        | "allow-ksm" => Type::Boolean,
        "cpuunits" | "balloon" | "shares" | "smp" | "sockets" | "cores" | "vcpus"
        | "migrate_speed" | "snaptime" => Type::Integer,
        "cpulimit" | "migrate_downtime" => Type::Number,
        "lock"
        | "keyboard"
        | "scsihw"
        | "description"
        | "ostype"
        | "hugepages"
        | "startdate"
        | "args"
        | "runningcpu"
        | "running-nets-host-mtu"
        | "arch"
        | "bios"
        | "vmgenid"
        | "citype"
        | "ciuser"
        | "cipassword"
        | "searchdomain" => Type::Text,
        // Proposed for Proxmox VE and not in 9.2: a form of `affinity`.
        "pinning" => Type::Text,
        "memory" => Type::Properties(&MEMORY),
        "boot" => Type::Properties(&BOOT),
        "agent" => Type::Properties(&AGENT),
        "vga" => Type::Properties(&VGA),
        "watchdog" => Type::Properties(&WATCHDOG),
        "machine" | "runningmachine" => Type::Properties(&MACHINE),
        "smbios1" => Type::Properties(&SMBIOS),
        "ivshmem" => Type::Properties(&IVSHMEM),
        "spice_enhancements" => Type::Properties(&SPICE),
        "meta" => Type::Properties(&META),
        "cicustom" => Type::Properties(&CICUSTOM),
        "amd-sev" => Type::Properties(&SEV),
        "intel-tdx" => Type::Properties(&TDX),
        "cdrom" => Type::Properties(&IDE),
        "cpu" => Type::Checked(check_cpu),
        "hotplug" => Type::Checked(|value| match value {
            "0" | "1" => Ok(()),
            _ => each(value, "hotplug feature", |feature| {
                HOTPLUG.contains(&feature)
            }),
        }),
        "name" => Type::Checked(|value| all("a DNS name", is_dns_name(value))),
        "bootdisk" => Type::Checked(|value| all("a disk", is_drive(value))),
        "startup" => Type::Checked(|value| {
            let parts = value.split(',').filter(|part| !part.chars().all(is_space));
            let is_part = |part: &str| {
                let number = ["order=", "up=", "down="]
                    .iter()
                    .find_map(|key| part.strip_prefix(key));
                is_digits(number.unwrap_or(part))
            };
            all(
                "a startup order",
                value != "0" && parts.clone().all(is_part),
            )
        }),
        "parent" => Type::Checked(|value| all("the name of a snapshot", is_config_id(value))),
        "vmstate" | "hookscript" => Type::Checked(|value| all("a volume", is_volume(value))),
        "vmstatestorage" => Type::Checked(|value| all("a storage", is_storage(value))),
        "tags" => Type::Checked(|value| each(value, "tag", is_tag)),
        "nameserver" => Type::Checked(|value| each(value, "address", is_address)),
        "sshkeys" => Type::Checked(|value| all("URL-encoded", is_urlencoded(value))),
        "affinity" => Type::Checked(|value| parse_cpus(value).map(|_| ())),
        _ => return None,
    })
}

const HOTPLUG: [&str; 6] = ["network", "disk", "cpu", "memory", "usb", "cloudinit"];

/// A key's letters, and the number after them if it has the one spelling that Proxmox VE knows.
pub(super) fn split_number(key: &str) -> (&str, Option<u32>) {
    let name = key.trim_end_matches(|char: char| char.is_ascii_digit());
    let digits = &key[name.len()..];
    let number = digits
        .parse::<u32>()
        .ok()
        .filter(|number| number.to_string() == digits);
    (name, number)
}

fn all(what: &str, good: bool) -> Result<(), String> {
    if good {
        Ok(())
    } else {
        Err(format!("not {what}"))
    }
}

fn each(value: &str, what: &str, is_one: impl Fn(&str) -> bool) -> Result<(), String> {
    match list(value).find(|item| !is_one(item)) {
        None => Ok(()),
        Some(item) => Err(format!("`{}` is not a {what}", excerpt(item))),
    }
}

/// The items of a list, as `PVE::Tools::split_list` splits it.
pub(super) fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(|char: char| matches!(char, ',' | ';' | '\0') || is_space(char))
        .filter(|item| !item.is_empty())
}

/// The ranges of a CPU list as Proxmox VE takes it (`PVE::CpuSet::parse_cpuset`): in any order,
/// with spaces around them, none at all; a number more than once.
///
/// # Errors
/// Why it does not take it.
pub(super) fn parse_cpus(text: &str) -> Result<Vec<(u64, u64)>, String> {
    // Perl's split drops what is empty at the end.
    let text = text.trim_end_matches(',');
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(',')
        .map(|part| parse_range(part.trim_matches(is_space)))
        .collect()
}

/// `N` or `N-M`.
pub(super) fn parse_range(text: &str) -> Result<(u64, u64), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    if !is_digits(first) || !is_digits(last) {
        return Err(format!("`{}` is not a number or a range", excerpt(text)));
    }
    // More digits than a number has are as good as the largest one.
    let number = |digits: &str| digits.parse().unwrap_or(u64::MAX);
    let (first, last) = (number(first), number(last));
    if first > last {
        return Err(format!(
            "{first}-{last} is a range that ends before it begins"
        ));
    }
    Ok((first, last))
}

/// `pve-configid`.
pub(super) fn is_config_id(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|char: char| char.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// `pve-storage-id`.
fn is_storage(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|char: char| char.is_ascii_alphabetic())
        && text.ends_with(|char: char| char.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

/// `pve-volume-id`: STORAGE:VOLUME.
fn is_volume(text: &str) -> bool {
    text.split_once(':')
        .is_some_and(|(storage, volume)| is_storage(storage) && !volume.is_empty())
}

/// `pve-volume-id-or-qm-path`.
fn is_volume_or_path(text: &str) -> bool {
    matches!(text, "none" | "cdrom") || text.starts_with('/') || is_volume(text)
}

/// `dns-name`.
fn is_dns_name(text: &str) -> bool {
    text.split('.').all(|label| {
        label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

fn is_address(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok() || is_dns_name(text)
}

fn is_urlencoded(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-%_.!~*'()".contains(&byte))
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut bytes = text.bytes();
    bytes.next().is_some_and(is_word) && bytes.all(|byte| is_word(byte) || b"-+.".contains(&byte))
}

fn is_drive(key: &str) -> bool {
    let (name, number) = split_number(key);
    number.is_some_and(|number| match name {
        "ide" => number < 4,
        "sata" => number < 6,
        "scsi" => number < 31,
        "virtio" => number < 16,
        "efidisk" | "tpmstate" => number == 0,
        _ => false,
    })
}

fn is_boot_device(key: &str) -> bool {
    let (name, number) = split_number(key);
    match name {
        "efidisk" | "tpmstate" => false,
        "net" => number.is_some_and(|number| number < 32),
        "usb" => number.is_some_and(|number| number < 14),
        "hostpci" => number.is_some_and(|number| number < MAX_HOSTPCI),
        _ => is_drive(key),
    }
}

fn is_disk_size(text: &str) -> bool {
    let number = text.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(text);
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    is_digits(whole) && is_digits(part)
}

fn is_base64(text: &str) -> bool {
    let digits = text.strip_suffix("==").or(text.strip_suffix('='));
    let digits = digits.unwrap_or(text);
    !digits.is_empty()
        && digits
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/')
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<_> = text.split('-').collect();
    parts.len() == 5
        && parts
            .iter()
            .zip([8, 4, 4, 4, 12])
            .all(|(part, digits)| is_hex(part, digits))
}

fn is_pci_id(text: &str) -> bool {
    text.strip_prefix("0x")
        .is_some_and(|digits| is_hex(digits, 4))
}

/// `$PCIRE` and further ones after `;`. Hexadecimal digits are lower-case only.
fn is_pci_list(text: &str) -> bool {
    let is_lower_hex = |text: &str| {
        text.bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_device = |text: &str| {
        let parts: Vec<_> = text.split(':').collect();
        let (domain, bus, device) = match parts[..] {
            [bus, device] => ("0000", bus, device),
            [domain, bus, device] => (domain, bus, device),
            _ => return false,
        };
        let (device, function) = device.split_once('.').unwrap_or((device, "0"));
        domain.len() >= 4
            && [bus, device].iter().all(|digits| digits.len() == 2)
            && function.len() == 1
            && [domain, bus, device, function]
                .into_iter()
                .all(is_lower_hex)
    };
    text.split(';').all(is_device)
}

/// `N-M;N;…`
fn is_number_list(text: &str) -> bool {
    text.split(';').all(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, "0"));
        is_digits(first) && is_digits(last)
    })
}

/// Whether a text is digits with dots between them, as many as are allowed.
fn is_version(text: &str, parts: std::ops::RangeInclusive<usize>) -> bool {
    parts.contains(&text.split('.').count()) && text.split('.').all(is_digits)
}

fn is_machine(text: &str) -> bool {
    if matches!(text, "pc" | "q35" | "virt") {
        return true;
    }
    let (name, is_virt) = match text.strip_prefix("virt") {
        Some(rest) => (rest, true),
        None => (text.strip_suffix(".pxe").unwrap_or(text), false),
    };
    let (name, revision) = name.split_once("+pve").unwrap_or((name, "0"));
    let number = match is_virt {
        true if name.is_empty() => return is_digits(revision),
        true => name.strip_prefix('-'),
        false => ["pc-i440fx-", "pc-q35-", "pc-"]
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix)),
    };
    text.len() <= 40
        && is_digits(revision)
        && number.is_some_and(|number| is_version(number, 2..=usize::MAX))
}

/// `pve-vm-cpu-conf`: the flags are of a short list, others are for custom models.
fn check_cpu(value: &str) -> Result<(), String> {
    const FLAGS: [&str; 13] = [
        "nested-virt",
        "md-clear",
        "pcid",
        "spec-ctrl",
        "ssbd",
        "ibpb",
        "virt-ssbd",
        "amd-ssbd",
        "amd-no-ssb",
        "pdpe1gb",
        "hv-tlbflush",
        "hv-evmcs",
        "aes",
    ];
    let values = property::parse(&CPU, value)?;
    if !values.contains_key("cputype") {
        return Err("`cputype` is missing".into());
    }
    if values.contains_key("reported-model") {
        return Err("`reported-model` is for custom models only".into());
    }
    let flags = values.get("flags").map_or("", String::as_str);
    match flags.split(';').find(|flag| {
        !flag.is_empty()
            && !flag
                .strip_prefix(['+', '-'])
                .is_some_and(|name| FLAGS.contains(&name))
    }) {
        None => Ok(()),
        Some(flag) => Err(format!("flag `{flag}` is for custom models only")),
    }
}

fn is_cpu_flags(text: &str) -> bool {
    text.split(';').all(|flag| {
        flag.strip_prefix(['+', '-']).is_some_and(|name| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        })
    })
}

fn is_phys_bits(text: &str) -> bool {
    text == "host"
        || (is_digits(text)
            && text.len() <= 2
            && text.parse().is_ok_and(|bits: u8| (8..=64).contains(&bits)))
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<_> = text.split(':').collect();
    bytes.len() == 6
        && bytes.iter().all(|byte| is_hex(byte, 2))
        && bytes[0].ends_with(['0', '2', '4', '6', '8', 'a', 'c', 'e', 'A', 'C', 'E'])
}

fn is_bridge(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fn is_cidr(text: &str, is_ip: fn(&str) -> bool, most: u32) -> bool {
    text.split_once('/').is_some_and(|(ip, bits)| {
        is_ip(ip) && is_digits(bits) && bits.parse().is_ok_and(|bits| (8..=most).contains(&bits))
    })
}

fn is_ipv4(text: &str) -> bool {
    text.parse::<std::net::Ipv4Addr>().is_ok()
}

fn is_ipv6(text: &str) -> bool {
    text.parse::<std::net::Ipv6Addr>().is_ok()
}

fn is_usb_host(text: &str) -> bool {
    let is_id = |text: &str| {
        text.split_once(':').is_some_and(|(vendor, product)| {
            [vendor, product]
                .iter()
                .all(|id| is_hex(id.strip_prefix("0x").unwrap_or(id), 4))
        })
    };
    let is_port = |text: &str| {
        text.split_once('-')
            .is_some_and(|(bus, port)| is_digits(bus) && is_version(port, 1..=usize::MAX))
    };
    is_id(text) || is_port(text) || text.eq_ignore_ascii_case("spice")
}

/// The keys of a format: `name: kind` each.
macro_rules! properties {
    ($($name:literal: $kind:expr),* $(,)?) => {
        &[$(Property { name: $name, kind: $kind }),*]
    };
}

/// A format: the key of a value without one, the keys that have to be there, and all keys.
macro_rules! property_format {
    ($name:ident, $default:expr, $required:expr, $($properties:expr),+) => {
        static $name: Format = Format {
            default_key: $default,
            required: $required,
            properties: &[$($properties),+],
        };
    };
}

use Kind::{
    Alias, Boolean, Integer, IntegerIn, KeyAlias, Matching, NumberFrom, NumberIn, OneOf, Text,
};

const ANY: f64 = f64::INFINITY;

pub(super) static HOSTPCI: Format = Format {
    default_key: Some("host"),
    required: &[],
    properties: &[properties! {
        "host": Matching(is_pci_list),
        "mapping": Matching(is_config_id),
        "rombar": Boolean,
        "romfile": Matching(|text| !text.contains(';')),
        "pcie": Boolean,
        "x-vga": Boolean,
        "legacy-igd": Boolean,
        "mdev": Matching(|text| !text.contains(['/', '.', ':'])),
        "driver": OneOf(&["vfio", "keep"]),
        "vendor-id": Matching(is_pci_id),
        "device-id": Matching(is_pci_id),
        "sub-vendor-id": Matching(is_pci_id),
        "sub-device-id": Matching(is_pci_id),
    }],
};

pub(super) static NUMA: Format = Format {
    default_key: None,
    required: &["cpus"],
    properties: &[properties! {
        "cpus": Matching(is_number_list),
        "memory": NumberIn(-ANY, ANY),
        "hostnodes": Matching(is_number_list),
        "policy": OneOf(&["preferred", "bind", "interleave"]),
    }],
};

pub(super) static MEMORY: Format = Format {
    default_key: Some("current"),
    required: &["current"],
    properties: &[properties! { "current": IntegerIn(16.0, ANY) }],
};

pub(super) static MACHINE: Format = Format {
    default_key: Some("type"),
    required: &[],
    properties: &[properties! {
        "type": Matching(is_machine),
        "viommu": OneOf(&["intel", "virtio"]),
        "aw-bits": NumberIn(32.0, 64.0),
        "enable-s3": Boolean,
        "enable-s4": Boolean,
    }],
};

property_format!(
    CPU,
    Some("cputype"),
    &[],
    properties! {
        "cputype": Text,
        "reported-model": Text,
        "hidden": Boolean,
        "hv-vendor-id": Matching(|text| text.len() <= 12 && text.bytes().all(|byte| byte.is_ascii_alphanumeric())),
        "flags": Matching(is_cpu_flags),
        "guest-phys-bits": IntegerIn(32.0, 64.0),
        "phys-bits": Matching(is_phys_bits),
    }
);

property_format!(
    BOOT,
    Some("legacy"),
    &[],
    properties! {
        "legacy": Matching(|text| (1..=4).contains(&text.len()) && text.bytes().all(|byte| b"acdn".contains(&byte))),
        "order": Matching(|text| list(text).all(is_boot_device)),
    }
);

property_format!(
    AGENT,
    Some("enabled"),
    &["enabled"],
    properties! {
        "enabled": Boolean,
        "fstrim_cloned_disks": Boolean,
        "freeze-fs-on-backup": Boolean,
        "guest-fsfreeze": Boolean,
        "type": OneOf(&["virtio", "isa"]),
    }
);

property_format!(
    VGA,
    Some("type"),
    &[],
    properties! {
        "type": OneOf(&[
            "cirrus", "qxl", "qxl2", "qxl3", "qxl4", "none", "serial0", "serial1", "serial2", "serial3",
            "std", "virtio", "virtio-gl", "vmware",
        ]),
        "memory": IntegerIn(4.0, 512.0),
        "clipboard": OneOf(&["vnc"]),
    }
);

property_format!(
    WATCHDOG,
    Some("model"),
    &[],
    properties! {
        "model": OneOf(&["i6300esb", "ib700"]),
        "action": OneOf(&["reset", "shutdown", "poweroff", "pause", "debug", "none"]),
    }
);

property_format!(
    SMBIOS,
    None,
    &[],
    properties! {
        "uuid": Matching(is_uuid),
        "version": Matching(is_base64),
        "serial": Matching(is_base64),
        "manufacturer": Matching(is_base64),
        "product": Matching(is_base64),
        "sku": Matching(is_base64),
        "family": Matching(is_base64),
        "base64": Boolean,
    }
);

property_format!(
    IVSHMEM,
    None,
    &["size"],
    properties! {
        "size": IntegerIn(1.0, ANY),
        "name": Matching(|text| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')),
    }
);

property_format!(
    AUDIO,
    None,
    &["device"],
    properties! {
        "device": OneOf(&["ich9-intel-hda", "intel-hda", "AC97"]),
        "driver": OneOf(&["spice", "none"]),
    }
);

property_format!(
    SPICE,
    None,
    &[],
    properties! {
        "foldersharing": Boolean,
        "videostreaming": OneOf(&["off", "all", "filter"]),
    }
);

property_format!(
    RNG,
    Some("source"),
    &["source"],
    properties! {
        "source": OneOf(&["/dev/urandom", "/dev/random", "/dev/hwrng"]),
        "max_bytes": Integer,
        "period": Integer,
    }
);

property_format!(
    META,
    None,
    &[],
    properties! {
        "ctime": IntegerIn(0.0, ANY),
        "creation-qemu": Matching(|text| is_version(text, 2..=usize::MAX)),
    }
);

property_format!(
    CICUSTOM,
    None,
    &[],
    properties! {
        "meta": Matching(is_volume),
        "network": Matching(is_volume),
        "user": Matching(is_volume),
        "vendor": Matching(is_volume),
    }
);

property_format!(
    SEV,
    Some("type"),
    &["type"],
    properties! {
        "type": OneOf(&["std", "es", "snp"]),
        "no-debug": Boolean,
        "no-key-sharing": Boolean,
        "allow-smt": Boolean,
        "kernel-hashes": Boolean,
    }
);

property_format!(
    TDX,
    Some("type"),
    &["type", "attestation"],
    properties! {
        "type": OneOf(&["tdx"]),
        "attestation": Boolean,
        "vsock-cid": IntegerIn(2.0, ANY),
        "vsock-port": IntegerIn(0.0, ANY),
    }
);

property_format!(
    VIRTIOFS,
    Some("dirid"),
    &["dirid"],
    properties! {
        "dirid": Matching(is_config_id),
        "cache": OneOf(&["auto", "always", "metadata", "never"]),
        "direct-io": Boolean,
        "writeback": Boolean,
        "expose-xattr": Boolean,
        "expose-acl": Boolean,
    }
);

property_format!(
    USB,
    Some("host"),
    &[],
    properties! {
        "host": Matching(is_usb_host),
        "mapping": Matching(is_config_id),
        "usb3": Boolean,
    }
);

property_format!(
    IPCONFIG,
    None,
    &[],
    properties! {
        "ip": Matching(|text| matches!(text, "dhcp" | "manual") || is_cidr(text, is_ipv4, 32)),
        "gw": Matching(is_ipv4),
        "ip6": Matching(|text| matches!(text, "auto" | "dhcp" | "manual") || is_cidr(text, is_ipv6, 128)),
        "gw6": Matching(is_ipv6),
    }
);

const MODELS: &[&str] = &[
    "e1000",
    "e1000-82540em",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "i82551",
    "i82557b",
    "i82559er",
    "ne2k_isa",
    "ne2k_pci",
    "pcnet",
    "rtl8139",
    "virtio",
    "vmxnet3",
];

const MODEL: Kind = KeyAlias {
    value_of: "macaddr",
    name_of: "model",
};

property_format!(
    NET,
    Some("model"),
    &["model"],
    properties! {
        "model": OneOf(MODELS),
        "macaddr": Matching(is_mac),
        "e1000": MODEL, "e1000-82540em": MODEL, "e1000-82544gc": MODEL, "e1000-82545em": MODEL,
        "e1000e": MODEL, "i82551": MODEL, "i82557b": MODEL, "i82559er": MODEL, "ne2k_isa": MODEL,
        "ne2k_pci": MODEL, "pcnet": MODEL, "rtl8139": MODEL, "virtio": MODEL, "vmxnet3": MODEL,
        "bridge": Matching(is_bridge),
        "queues": IntegerIn(0.0, 64.0),
        "rate": NumberFrom(0.0),
        "tag": IntegerIn(1.0, 4094.0),
        "trunks": Matching(is_number_list),
        "firewall": Boolean,
        "link_down": Boolean,
        "mtu": IntegerIn(1.0, 65520.0),
    }
);

const VOLUME: &[Property] = properties! {
    "file": Matching(is_volume_or_path),
    "volume": Alias("file"),
    "size": Matching(is_disk_size),
};

const IMAGE: &[Property] = properties! {
    "format": OneOf(&["raw", "qcow", "qed", "qcow2", "vmdk", "cloop"]),
};

const DISK: &[Property] = properties! {
    "media": OneOf(&["cdrom", "disk"]),
    "cyls": Integer,
    "heads": Integer,
    "secs": Integer,
    "trans": OneOf(&["none", "lba", "auto"]),
    "snapshot": Boolean,
    "cache": OneOf(&["none", "writethrough", "writeback", "unsafe", "directsync"]),
    "backup": Boolean,
    "replicate": Boolean,
    "rerror": OneOf(&["ignore", "report", "stop"]),
    "werror": OneOf(&["enospc", "ignore", "report", "stop"]),
    "aio": OneOf(&["native", "threads", "io_uring"]),
    "discard": OneOf(&["ignore", "on"]),
    "detect_zeroes": Boolean,
    "serial": Matching(|text| text.len() <= 60 && is_urlencoded(text)),
    "shared": Boolean,
    "bps": Integer, "bps_rd": Integer, "bps_wr": Integer,
    "mbps": NumberIn(-ANY, ANY), "mbps_rd": NumberIn(-ANY, ANY), "mbps_wr": NumberIn(-ANY, ANY),
    "iops": Integer, "iops_rd": Integer, "iops_wr": Integer,
    "mbps_max": NumberIn(-ANY, ANY), "mbps_rd_max": NumberIn(-ANY, ANY), "mbps_wr_max": NumberIn(-ANY, ANY),
    "iops_max": Integer, "iops_rd_max": Integer, "iops_wr_max": Integer,
    "bps_max_length": IntegerIn(1.0, ANY),
    "bps_rd_max_length": IntegerIn(1.0, ANY),
    "bps_wr_max_length": IntegerIn(1.0, ANY),
    "iops_max_length": IntegerIn(1.0, ANY),
    "iops_rd_max_length": IntegerIn(1.0, ANY),
    "iops_wr_max_length": IntegerIn(1.0, ANY),
    "bps_rd_length": Alias("bps_rd_max_length"),
    "bps_wr_length": Alias("bps_wr_max_length"),
    "iops_rd_length": Alias("iops_rd_max_length"),
    "iops_wr_length": Alias("iops_wr_max_length"),
};

const IOTHREAD: &[Property] = properties! { "iothread": Boolean };
const READ_ONLY: &[Property] = properties! { "ro": Boolean };
const MODEL_NAME: &[Property] =
    properties! { "model": Matching(|text| text.len() <= 120 && is_urlencoded(text)) };
const SSD: &[Property] = properties! {
    "ssd": Boolean,
    "wwn": Matching(|text| text.strip_prefix("0x").is_some_and(|digits| is_hex(digits, 16))),
};
const SCSI_ONLY: &[Property] = properties! {
    "product": Matching(|text| is_inquiry(text, 16)),
    "vendor": Matching(|text| is_inquiry(text, 8)),
    "queues": IntegerIn(2.0, ANY),
    "scsiblock": Boolean,
};

fn is_inquiry(text: &str, most: usize) -> bool {
    text.len() <= most
        && text
            .chars()
            .all(|char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_') || is_space(char))
}

property_format!(
    IDE,
    Some("file"),
    &["file"],
    VOLUME,
    IMAGE,
    DISK,
    MODEL_NAME,
    SSD
);
property_format!(SATA, Some("file"), &["file"], VOLUME, IMAGE, DISK, SSD);
property_format!(
    SCSI,
    Some("file"),
    &["file"],
    VOLUME,
    IMAGE,
    DISK,
    SSD,
    IOTHREAD,
    READ_ONLY,
    SCSI_ONLY
);
property_format!(
    VIRTIO,
    Some("file"),
    &["file"],
    VOLUME,
    IMAGE,
    DISK,
    IOTHREAD,
    READ_ONLY
);
property_format!(
    EFIDISK,
    Some("file"),
    &["file"],
    VOLUME,
    IMAGE,
    properties! {
        "efitype": OneOf(&["2m", "4m"]),
        "pre-enrolled-keys": Boolean,
        "ms-cert": OneOf(&["2011", "2023", "2023w"]),
    }
);
property_format!(
    TPMSTATE,
    Some("file"),
    &["file"],
    VOLUME,
    properties! {
        "version": OneOf(&["v1.2", "v2.0"]),
    }
);
property_format!(
    UNUSED,
    Some("file"),
    &["file"],
    properties! {
        "file": Matching(is_volume),
        "volume": Alias("file"),
    }
);

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn values_that_proxmox_takes() {
        for (key, values) in [
            ("cores", &["0", "007", "99999999999999999999"] as &[&str]),
            (
                "template",
                &["1", "on", "YES", "True", "0", "Off", "no", "FALSE"],
            ),
            ("cpulimit", &["0", "1.5"]),
            ("hugepages", &["any", "1024", "x", " "]),
            ("lock", &["backup", "x", "\""]),
            ("pinning", &["numa"]),
            ("name", &["a", "a-b.c0", "0"]),
            (
                "affinity",
                &[
                    "0",
                    "0,2-4",
                    "3,0-4,1",
                    " 0 , 2-4 ",
                    "1-1",
                    "0,",
                    ",",
                    "0,,",
                ],
            ),
            (
                "hookscript",
                &["local:snippets/hook", "a.b-c:x:y z", "L0:x"],
            ),
            (
                "hotplug",
                &[
                    "0",
                    "1",
                    "cpu",
                    "network,disk;cpu usb",
                    "memory,cloudinit",
                    " ",
                ],
            ),
            ("memory", &["16", "current=4096", "+2048"]),
            (
                "machine",
                &[
                    "pc",
                    "q35",
                    "pc-i440fx-9.2+pve1",
                    "pc-q35-8.1.pxe",
                    "q35,viommu=intel",
                    "virt-10.0",
                    "virt",
                ],
            ),
            (
                "cpu",
                &[
                    "host",
                    "cputype=x86-64-v3",
                    "host,hidden=1,flags=+aes;-pcid",
                    "custom-a",
                ],
            ),
            (
                "numa0",
                &["cpus=0", "cpus=0-3;5,memory=1e3,hostnodes=0-1,policy=bind"],
            ),
            (
                "hostpci15",
                &[
                    "01:00.4",
                    "0000:01:00",
                    "10000:ff:ff.f;01:00",
                    "host=01:00,pcie=on,",
                    "pcie=1",
                    "mapping=gpu-1,01:00",
                    "01:00,romfile=a=b.rom,mdev=nvidia-63,driver=keep,vendor-id=0x10DE",
                    ",",
                ],
            ),
            ("tpmstate0", &["local:100/x.raw,size=4M,version=v2.0"]),
            (
                "efidisk0",
                &["local-lvm:vm-100-disk-0,efitype=4m,pre-enrolled-keys=1,ms-cert=2023,size=4M"],
            ),
            (
                "scsi30",
                &[
                    "local-lvm:vm-100-disk-0,iothread=1,size=64G,ssd=1,discard=on,mbps_rd=1.5",
                    "/dev/sda",
                    "volume=a1:x",
                ],
            ),
            (
                "ide2",
                &["none,media=cdrom", "local:iso/a.iso,media=cdrom,size=1K"],
            ),
            ("unused255", &["local:100/x.raw"]),
            (
                "net31",
                &[
                    "virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,tag=5",
                    "virtio",
                    "model=e1000,macaddr=02:00:00:00:00:00",
                ],
            ),
            (
                "usb13",
                &["host=1-2.3", "0x1234:abcd,usb3=1", "SPICE", "mapping=ab"],
            ),
            ("virtiofs9", &["share,cache=always"]),
            ("serial3", &["socket", "x"]),
            (
                "boot",
                &["order=scsi0;net0;hostpci0", "cdn", "legacy=c", "order="],
            ),
            ("startup", &["order=1,up=2,down=3", "1", ","]),
            ("tags", &["a;B,c_d-e+f.g", ""]),
            (
                "ipconfig0",
                &["ip=10.0.0.2/24,gw=10.0.0.1", "ip=dhcp,ip6=auto"],
            ),
            ("meta", &["creation-qemu=10.0.2,ctime=1700000000"]),
            (
                "smbios1",
                &["uuid=01234567-89ab-cdef-0123-456789abcdef,serial=QUJD,base64=1"],
            ),
            ("agent", &["1", "enabled=1,fstrim_cloned_disks=1"]),
            ("vga", &["none", "virtio,memory=32"]),
            ("rng0", &["source=/dev/urandom"]),
            ("amd-sev", &["std,no-debug=1"]),
        ] {
            for value in values {
                let found = check(key, value);
                // `order=` has no value.
                let bad = (key, *value) == ("boot", "order=");
                assert_eq!(found.is_err(), bad, "{key}: {value:?} {found:?}");
            }
        }
        assert_eq!(check("hugepages", "\"2\""), Ok("2"));
    }

    #[test]
    fn values_that_proxmox_passes_over() {
        for (key, values) in [
            (
                "cores",
                &[
                    "x", "-4", "+4", "4.0", "4 # four", " ", "4\u{a0}", "\u{664}", "0x4",
                ] as &[&str],
            ),
            ("template", &["x", "2", " ", "yes please"]),
            ("cpulimit", &["1.", ".5", "-1", "1e3"]),
            (
                "name",
                &["gr\u{fc}n", "a_b", "-a", "a-", "a..b", "a b", "."],
            ),
            (
                "affinity",
                &[
                    " ", "4-2", "a", "0,,1", ",0", "0-", "-1", "0--1", "0 1", "0-1-2", "+1",
                ],
            ),
            (
                "hookscript",
                &[
                    "/root/hook",
                    "hook",
                    "l:x",
                    "local:",
                    "-a:x",
                    "a-:x",
                    "\"local:x\"",
                ],
            ),
            ("hotplug", &["cpus", "cpu,x", "2", "CPU"]),
            ("memory", &["2G", "15", "x", "current=1,2048"]),
            (
                "machine",
                &["pc-9", "x", "q35,foo=1", "i440fx", "pc-q35-9.x", "virt-10"],
            ),
            (
                "cpu",
                &[
                    "hidden=1",
                    "host,flags=+topoext",
                    "host,reported-model=kvm64",
                    "host,flags=aes",
                ],
            ),
            (
                "numa0",
                &[
                    "memory=512",
                    "0-3,memory=512",
                    "cpus=0-3,memory=512M",
                    "cpus=x",
                    "cpus=0,policy=x",
                    "cpus=0;",
                ],
            ),
            ("numa8", &["cpus=0"]),
            (
                "hostpci0",
                &[
                    "0000-01-00.4",
                    "234:f0:13.1",
                    "01:00.",
                    "0x01:00.4",
                    "01:00.4,01:00.5",
                    "01:00.4;",
                    "0000:01:00.4-1",
                    "1:0.4",
                    "01:00.4,host=01:00.5",
                    "01:00.4,foo=1",
                    "0000:01:00.4;00:1F.1",
                    "01:00.40",
                    "01:00.4, pcie=1",
                    "01:00.4,pcie=2",
                    "mapping=x",
                    "01:00,mdev=a/b",
                    "01:00,romfile=",
                    "01:00 ;01:00",
                    "01:00,driver=x",
                    "01:00,vendor-id=10de",
                    "0",
                ],
            ),
            ("hostpci", &["01:00.4"]),
            ("hostpci01", &["01:00.4"]),
            ("hostpci16", &["01:00.4"]),
            (
                "tpmstate0",
                &["size=4M", "local:x,version=v3", "local:x,format=raw", "x"],
            ),
            ("tpmstate1", &["local:100/x.raw"]),
            (
                "scsi0",
                &["local:x,foo=1", "x", "local:x,size=1X", "local:x,model=a"],
            ),
            ("scsi31", &["local:x"]),
            (
                "net0",
                &[
                    "foo=BC:24:11:00:00:01",
                    "virtio=03:00:00:00:00:00",
                    "bridge=vmbr0",
                    "virtio,tag=0",
                ],
            ),
            ("usb0", &["x", "1234:5", "usb3=x"]),
            ("virtiofs10", &["share"]),
            ("serial4", &["socket"]),
            ("boot", &["order=x", "x", "order=efidisk0"]),
            ("startup", &["x", "order=x", "0"]),
            ("tags", &["a b:c", "-a"]),
            ("ipconfig0", &["ip=10.0.0.2", "10.0.0.2/24"]),
            ("agent", &["x", "type=isa"]),
            ("foo", &["bar"]),
            ("numa00", &["cpus=0"]),
        ] {
            for value in values {
                assert!(check(key, value).is_err(), "{key}: {value:?}");
            }
        }
    }
}
