//! A wrong command line, told as any other failure is; help and version as they are.

use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::{
    failure::Failure,
    ui::{self, Ui},
};

/// Tells what is wrong with the command line, or prints the help that was asked for.
pub(super) fn report(error: &clap::Error, tree: &clap::Command, no_colour: bool) -> ExitCode {
    let ui = Ui::new(false, false, 0, no_colour);
    let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let failure = if asked {
        match error.print() {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => ui::unwritten(error),
        }
    } else {
        translate(&error.render().to_string(), &command_of(tree, std::env::args().skip(1)))
    };
    ui.fail(&failure);
    ExitCode::from(failure.exit_code())
}

/// The command that these arguments mean, as far as they name one.
fn command_of(tree: &clap::Command, arguments: impl Iterator<Item = String>) -> String {
    let mut command = tree;
    let mut words = tree.get_name().to_owned();
    for argument in arguments.take_while(|argument| argument != "--") {
        if let Some(below) = command.find_subcommand(&argument) {
            command = below;
            words = format!("{words} {argument}");
        }
    }
    words
}

/// The parser's paragraphs: what is wrong, maybe tips, the usage line, where help is.
fn translate(rendered: &str, command: &str) -> Failure {
    let mut paragraphs = rendered.split("\n\n");
    let what = paragraphs.next().unwrap_or_default().trim_start_matches("error: ").trim();
    let rest: Vec<&str> = paragraphs.map(str::trim).collect();
    let usage = rest.iter().find_map(|paragraph| paragraph.strip_prefix("Usage: "));
    let tips = rest.iter().find_map(|paragraph| paragraph.strip_prefix("tip: "));
    let failure = if rendered.starts_with("error: ") { Failure::usage(what) } else { Failure::usage("say what to do") };
    let failure = match usage {
        Some(usage) => failure.cause(format!("the usage is {}", usage.lines().next().unwrap_or_default())),
        None => failure,
    };
    let help = format!("`{command} --help` shows examples");
    // The most frequent slip: what is to run follows the host at once.
    let runs = command.ends_with(" exec") && what.starts_with("unexpected argument");
    let help = if runs { format!("put `--` in front of what is to run; {help}") } else { help };
    failure.hint(match tips {
        Some(tips) => {
            let tips: Vec<&str> = tips.split("tip: ").map(str::trim).collect();
            format!("{}; {help}", tips.join("; "))
        }
        None => help,
    })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    fn told(arguments: &[&str]) -> Failure {
        let command = command_of(&Cli::command(), arguments[1..].iter().map(ToString::to_string));
        translate(&Cli::try_parse_from(arguments).unwrap_err().render().to_string(), &command)
    }

    #[test]
    fn a_wrong_argument_is_told_in_three_lines() {
        let failure = told(&["peer", "exec", "web-1", "--cwdd", "/"]);
        assert!(failure.what.contains("--cwdd"), "{failure:?}");
        assert!(failure.cause.unwrap().contains("peer exec"));
        assert!(failure.hint.unwrap().contains("`peer exec --help`"));
    }

    #[test]
    fn a_value_that_does_not_read_leads_to_the_help_of_its_command() {
        let failure = told(&["peer", "--json", "fleet", "exec", "--target", "a&", "--", "ls"]);
        assert!(failure.what.contains("'a&'"), "{failure:?}");
        assert!(failure.hint.unwrap().contains("`peer fleet exec --help`"));
    }

    #[test]
    fn a_missing_command_is_told_without_the_whole_help() {
        let failure = told(&["peer"]);
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.what.len() < 80, "{failure:?}");
    }
}
