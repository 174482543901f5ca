//! The systems that a lab host can run.

use std::fmt;
use std::str::FromStr;

/// A Debian release to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Debian 13: systemd 257, kernel 6.12.
    Trixie,
    /// Debian 12: systemd 252, kernel 6.1.
    Bookworm,
    /// Debian 13 with the kernel of its backports, 7.
    Backports,
    /// Debian 13 with a core that is isolated on the kernel's command line.
    Isolcpus,
}

impl Guest {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Trixie,
        Self::Bookworm,
        Self::Backports,
        Self::Isolcpus,
    ];

    /// Its name: the release's, and what is special.
    pub fn name(self) -> &'static str {
        match self {
            Self::Isolcpus => "trixie-isolcpus",
            Self::Trixie | Self::Bookworm | Self::Backports => self.image(),
        }
    }

    /// The name of its image, which may be that of another.
    pub(crate) fn image(self) -> &'static str {
        match self {
            Self::Trixie | Self::Isolcpus => "trixie",
            Self::Bookworm => "bookworm",
            Self::Backports => "trixie-backports",
        }
    }

    /// What its image has installed beside what all have.
    pub(crate) fn packages(self) -> &'static [&'static str] {
        match self {
            // What a user of the package may have.
            Self::Trixie | Self::Isolcpus => &[
                "ansible-core",
                "bash-completion",
                "fish",
                "man-db",
                "python3-apt",
                "zsh",
            ],
            Self::Bookworm | Self::Backports => &[],
        }
    }

    /// What its kernel's command line has beside that of all.
    pub(crate) fn kernel_line(self) -> Option<&'static str> {
        match self {
            Self::Isolcpus => Some("isolcpus=2,14"),
            Self::Trixie | Self::Bookworm | Self::Backports => None,
        }
    }

    /// The sources of its packages, those of the kernel from the last.
    pub(crate) fn suites(self) -> &'static [&'static str] {
        match self {
            Self::Trixie | Self::Isolcpus => &["trixie"],
            Self::Bookworm => &["bookworm"],
            Self::Backports => &["trixie", "trixie-backports"],
        }
    }
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Guest {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|guest| guest.name() == name);
        found.ok_or_else(|| {
            format!(
                "no such guest: there are {}",
                Self::ALL.map(Self::name).join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for guest in Guest::ALL {
            assert_eq!(guest.to_string().parse(), Ok(guest));
        }
        assert_eq!(
            "sid".parse::<Guest>().unwrap_err(),
            "no such guest: there are trixie, bookworm, trixie-backports, trixie-isolcpus"
        );
    }
}
